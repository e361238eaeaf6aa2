"""The survival explorer: what of an adapter's change a merge into 4 bits keeps, by layer, for changes of several sizes.

State: factor, shown. The picture: on the left a map of the model with a row for each block of layers and a column for
each projection, coloured by what survives; on the right, over the size of the change, the mean of both figures and the
share of the adapter's effect that the merge loses (KL after the merge / KL of the adapter itself).

All merges are made before (export/survival.py): a slider cannot wait for them.
"""

from matplotlib.axes import Axes

from qlora_lab.export.parity import Parity
from qlora_lab.export.survival import Survival
from qlora_lab.show.block_size import places
from qlora_lab.show.escape import for_picture
from qlora_lab.show.explorer import Explorer, fix_layout
from qlora_lab.show.figure import COLOURS, all_masked, new_figure
from qlora_lab.show.slider import Slider

SHOWN = {"cosine": "cosine", "codes moved": "nibbles_changed"}  # name -> field of a layer's Change
MOST_LOST = 1.3  # of the axis: a merge may be farther from the adapter model than the base is
LINES = {"cosine": ("blue", "o"), "codes moved": ("green", "s"), "effect lost": ("orange", "D")}  # colour and marker


def shares(report: Parity) -> dict[str, float]:
    """Return the three figures of a report, by the names in LINES; the last is 0 if the adapter changed nothing."""
    lost = report.kl / report.adapter_kl if report.adapter_kl else 0.0
    return {"cosine": report.cosine or 0.0, "codes moved": report.nibbles_changed or 0.0, "effect lost": lost}


class SurvivalExplorer(Explorer):
    """The size of the change, and its survival in each layer. See Explorer.

    SurvivalExplorer(survived, factor=4): survived comes from export.survival; factor is one of its reports'.
    Raises ValueError if two layers share a place on the map.
    """

    def __init__(self, survived: Survival, **state):
        self.survived = survived
        super().__init__(**state)

    def controls(self):
        factors = sorted(self.survived.reports)
        start = 1 if 1 in factors else factors[0]
        return {
            "factor": Slider("Size of the change", start, choices=factors, unit="times what was learned"),
            "shown": Slider("Map", "cosine", choices=list(SHOWN)),
        }

    def compute(self, state):
        report = self.survived.reports[state["factor"]]
        values = {path: getattr(change, SHOWN[state["shown"]]) for path, change in report.layers.items()}
        return {
            "shown": state["shown"],
            "size": state["factor"] * self.survived.size,  # of the change, as a share of the weights
            "report": report,
            "shares": shares(report),
            "values": values,  # layer -> what the map shows; None for a layer without a change
        }

    def draw(self):
        fig, (left, right) = new_figure(2, width=8.2, height=4.4)
        left.get_gridspec().set_width_ratios([1, 1.6])
        self.image = self._draw_map(left)
        bar = fig.colorbar(self.image, ax=left, fraction=0.08, pad=0.04, ticks=[0, 0.5, 1])
        bar.ax.tick_params(labelsize=12)
        self.title = left.text(0, 1.03, "codes moved", transform=left.transAxes, va="bottom", fontsize=12)
        self._draw_lines(right)
        (self.line,) = right.plot([], [], color=COLOURS["black"], lw=1, ls="--")
        self.dots = [right.plot([], [], mark, ms=10, color=COLOURS[c], mec="#ffffff")[0] for c, mark in LINES.values()]
        fix_layout(fig)
        return fig, [self.image, self.title, self.line, *self.dots]

    def _draw_map(self, ax: Axes):
        rows, columns, self._cells = places(tuple(self.survived.sizes))
        self._map = all_masked((len(rows), len(columns)))
        ax.set_xticks(range(len(columns)), map(for_picture, columns), rotation=90, fontsize=12)
        ax.set_yticks(range(0, len(rows), max(1, len(rows) // 6)))
        ax.set_yticklabels([rows[i] for i in ax.get_yticks()], fontsize=12)
        ax.set_ylabel("block of layers", fontsize=12)
        ax.tick_params(length=0)
        return ax.imshow(self._map, aspect="auto", interpolation="nearest", cmap="cividis", vmin=0, vmax=1)

    def _draw_lines(self, ax: Axes) -> None:
        factors = sorted(self.survived.reports)
        sizes = [100 * factor * self.survived.size for factor in factors]
        points = [shares(self.survived.reports[factor]) for factor in factors]
        for name, (colour, mark) in LINES.items():
            heights = [min(point[name], MOST_LOST) for point in points]
            ax.plot(sizes, heights, mark, ls="-", ms=5, color=COLOURS[colour], label=name)
        ax.set(xscale="log", ylim=(-0.03, MOST_LOST + 0.02))
        # three digits: with two, 128 % would be 1.3e+02
        ax.set_xticks(sizes, [f"{size:.3g}" for size in sizes])
        ax.minorticks_off()
        ax.tick_params(labelsize=12)
        ax.set_xlabel("size of the change, % of the weights", fontsize=12)
        ax.set_ylabel("share", fontsize=12)
        ax.legend(frameon=False, fontsize=12, loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=3, columnspacing=1)

    def update(self, result):
        for layer, value in result["values"].items():
            self._map[self._cells[layer]] = 0.0 if value is None else value
        self.image.set_data(self._map)
        self.title.set_text(result["shown"])
        size = 100 * result["size"]
        self.line.set_data([size, size], [0, MOST_LOST])
        for dot, value in zip(self.dots, result["shares"].values(), strict=True):
            dot.set_data([size], [min(value, MOST_LOST)])

    @staticmethod
    def describe(state, result):
        report = result["report"]
        found = result["shares"]
        values = [value for value in result["values"].values() if value is not None]
        return (
            f"A change {state['factor']:g} times the learned one, {100 * result['size']:.2g} % of the weights: "
            f"{100 * found['codes moved']:.2g} % of the codes move, cosine {found['cosine']:.2f}; merged into 4 bits "
            f"the model is {report.kl:.2g} nats a token from the adapter model, which is {report.adapter_kl:.2g} from "
            f"its base; {state['shown']} of the layers {min(values, default=0):.2g} to {max(values, default=0):.2g}"
        )

    def code(self):
        return f"SurvivalExplorer(survived, {', '.join(f'{k}={v!r}' for k, v in self.state.items())})"
