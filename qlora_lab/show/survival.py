"""The survival explorer: what of an adapter's change a merge into 4 bits keeps, by layer, for changes of several sizes.

State: factor, shown. The picture: above a map of the model with a column for each block of layers and a row for
each projection, coloured by what survives; below, over the size of the change, the mean of both figures and the
share of the adapter's effect that the merge loses (KL after the merge / KL of the adapter itself).

All merges are made before (export/survival.py): a slider cannot wait for them.
"""

from matplotlib.axes import Axes

from qlora_lab.export.parity import Parity
from qlora_lab.export.survival import Survival
from qlora_lab.show.block_size import draw_map
from qlora_lab.show.explorer import Explorer, fix_layout
from qlora_lab.show.figure import BESIDE, CLOSE, COLOURS, IN_DETAIL, TITLE, new_figure
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
        fig, (upper, lower) = new_figure(rows=2, width=BESIDE, height=4.8, heights=[1, 1.25])
        self.image = self._draw_map(upper)
        bar = fig.colorbar(self.image, ax=upper, fraction=0.08, pad=0.02, ticks=[0, 0.5, 1])
        self.name = bar.ax.text(0.5, 1.05, "moved", transform=bar.ax.transAxes, ha="center", va="bottom")
        self.title = upper.set_title("effect", loc="left", fontsize=TITLE)
        self._draw_lines(lower)
        (self.line,) = lower.plot([], [], color=COLOURS["black"], lw=1, ls="--")
        self.dots = [lower.plot([], [], mark, ms=10, color=COLOURS[c], mec="#ffffff")[0] for c, mark in LINES.values()]
        fix_layout(fig)
        return fig, [self.image, self.name, self.title, self.line, *self.dots]

    def _draw_map(self, ax: Axes):
        self._map, self._cells = draw_map(ax, tuple(self.survived.sizes))
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
        ax.set(xlabel="size of the change, % of the weights", ylabel="share")
        ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, **CLOSE)

    def update(self, result):
        for layer, value in result["values"].items():
            self._map[self._cells[layer]] = 0.0 if value is None else value
        self.image.set_data(self._map)
        self.name.set_text(result["shown"].removeprefix("codes "))
        lost = 100 * min(1.0, result["shares"]["effect lost"])
        self.title.set_text(f"A merge into 4 bits loses {lost:.0f} % of the effect")
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
            f"{100 * found['codes moved']:.2g} % of the codes move, cosine {found['cosine']:.2f}{IN_DETAIL}"
            f"merged into 4 bits the model is {report.kl:.2g} nats a token from the adapter model, which is "
            f"{report.adapter_kl:.2g} from its base; {state['shown']} of the layers {min(values, default=0):.2g} to "
            f"{max(values, default=0):.2g}"
        )

    def code(self):
        return f"SurvivalExplorer(survived, {', '.join(f'{k}={v!r}' for k, v in self.state.items())})"
