"""Two explorers of data types: the damage of one outlier to its block, and a codebook that the reader drags into shape.

OutlierExplorer. State: codebook, block_size, outlier, position. The picture: 256 normal weights, one of them replaced
by the outlier, over the levels of their blocks; beside it the use of the codes in the outlier's block.

CodebookExplorer. State: levels, block_size. The picture: the levels over a histogram of scaled weights, the use of
their codes, and the error they leave beside that of other data types. A bar that leaves its axis ends in an arrow.

"Error" is squared error over squared weight. Without weights of your own both explorers show normal ones.
"""

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from qlora_lab.measure.code_use import CodeUse, code_use
from qlora_lab.measure.codebook_trial import (
    LARGEST_BLOCK,
    SAMPLE,
    block_counts,
    error_beside,
    normal_weights,
    shaped_levels,
    some_runs,
)
from qlora_lab.quant.blocks import block_absmax, scale_blocks, to_blocks
from qlora_lab.quant.codebook import codebook
from qlora_lab.quant.lloyd_max import lloyd_max
from qlora_lab.quant.quantize import QuantizedTensor, quantize
from qlora_lab.show.explorer import Explorer, fix_layout
from qlora_lab.show.figure import BESIDE, CLOSE, COLOURS, IN_DETAIL, SMALLEST, TITLE, bars, new_figure
from qlora_lab.show.levels import Levels, shortest
from qlora_lab.show.slider import Slider, Steps

NAMES = {"nf4": "NF4", "fp4": "FP4", "int4": "INT4", "e2m1": "E2M1", "e3m0": "E3M0", "nf3": "NF3", "nf2": "NF2"}
N_WEIGHTS = 256  # of the outlier's picture: four blocks of 64, and each weight is still a visible dot
FARTHEST = 12  # standard deviations of the outlier: on a fixed axis the other weights must stay apart
COMPARED = ("nf4", "fp4", "int4")
BINS = 81  # of the histogram; an odd number, so that zero lies in the middle of a bin
LEAST, MOST = 0.5, 30  # % of error, on a logarithmic axis
MOST_USED = 30  # % of the weights with one code: room for four times an equal share


class OutlierExplorer(Explorer):
    """One outlier, its block, and the levels that remain for the other weights. See Explorer."""

    def controls(self):
        sizes = [size for size in (16, 32, 64, 128, 256) if size <= N_WEIGHTS]
        return {
            "codebook": Slider("Data type", "int4", choices=list(NAMES)),
            "block_size": Slider("Block size", N_WEIGHTS, choices=sizes, unit="weights"),
            "outlier": Slider("Outlier", -10, Steps(-FARTHEST, FARTHEST), unit="standard deviations"),
            "position": Slider("Position", 100, Steps(0, N_WEIGHTS - 1)),
        }

    @staticmethod
    def compute(state):
        plain = normal_weights(N_WEIGHTS)  # (256,)
        weight = plain.clone()
        weight[state["position"]] = state["outlier"]
        options = state["codebook"], state["block_size"]
        q = quantize(weight, *options)
        counts = block_counts(q, state["position"])  # (2^bits,), by size of the level
        return {
            "weight": weight,
            "q": q,
            "counts": counts,
            "used": int((counts > 0).sum()),  # codes
            "error": error_beside(weight, q, state["position"]),
            "without": error_beside(plain, quantize(plain, *options), state["position"]),
        }

    def draw(self):
        fig, (upper, lower) = new_figure(rows=2, width=BESIDE, height=4.6, heights=[2, 1])
        upper.set(xlim=(-1, N_WEIGHTS), ylim=(-FARTHEST - 0.5, FARTHEST + 0.5), xlabel="number of the weight")
        upper.set_ylabel("standard deviations")
        upper.set_xticks(range(0, N_WEIGHTS + 1, 64))
        self.free = upper.add_collection(LineCollection([], colors=COLOURS["orange"], lw=0.8, label="level not used"))
        self.levels = upper.add_collection(LineCollection([], colors=COLOURS["blue"], lw=1.2, label="level in use"))
        (self.dots,) = upper.plot([], [], ".", ms=3, color=COLOURS["black"], label="weight")
        (self.outlier,) = upper.plot([0], [0], "o", ms=7, color=COLOURS["red"], clip_on=False, label="outlier")
        fig.legend(*upper.get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False, **CLOSE)
        lower.set(xlim=(-0.8, 15.8), ylim=(0, 104), xlabel="code, by size of its level", ylabel="% of the block")
        lower.set_yticks([0, 50, 100])
        self.bars = lower.add_collection(LineCollection([], colors=COLOURS["blue"], lw=10, capstyle="butt"))
        (self.unused,) = lower.plot([0], [2], "x", ms=6, mew=2, color=COLOURS["orange"], clip_on=False)
        self.title = upper.set_title("codes", loc="left", fontsize=TITLE)
        self.note = lower.set_title("error", loc="left", fontsize=TITLE)
        fix_layout(fig)
        return fig, [self.free, self.levels, self.dots, self.outlier, self.bars, self.unused, self.title, self.note]

    def update(self, result):
        weight = result["weight"]
        q = result["q"]
        counts = result["counts"].numpy()
        used, free = level_lines(q)
        self.levels.set_segments(used)
        self.free.set_segments(free)
        self.dots.set_data(range(len(weight)), weight)
        far = int((weight - normal_weights(N_WEIGHTS)).abs().argmax())  # the outlier's place
        self.outlier.set_data([far], [weight[far]])
        self.bars.set_segments(bars(range(len(counts)), 100 * counts / q.block_size))
        unused = np.flatnonzero(counts == 0)
        self.unused.set_data(unused, np.full(len(unused), 2))
        self.title.set_text(f"Beside the outlier {result['used']} of {len(counts)} codes are in use")
        error, without = (f"{100 * result[name]:.3g} %" for name in ("error", "without"))
        self.note.set_text(f"The others' error is {error}, without the outlier {without}")

    @staticmethod
    def describe(state, result):
        errors = f"{100 * result['error']:.3g} %, without the outlier {100 * result['without']:.3g} %"
        return (
            f"{NAMES[state['codebook']]}, blocks of {state['block_size']}, an outlier of {state['outlier']} at "
            f"{state['position']}: its block uses {result['used']} of {len(result['counts'])} codes; error of the "
            f"others {errors}"
        )


def level_lines(q: QuantizedTensor) -> tuple[list, list]:
    """Draw each level of each block as a line from its first weight to its last: levels in use, and unused levels."""
    lines: tuple[list, list] = ([], [])
    for number, (codes, absmax) in enumerate(zip(to_blocks(q.codes, q.block_size).int(), q.absmax, strict=True)):
        left = number * q.block_size
        right = left + q.block_size - 2  # a gap before the next block
        for code, level in enumerate((q.levels * absmax).tolist()):
            if abs(level) <= absmax:  # INT4's lowest level lies beyond every weight
                lines[int((codes != code).all())].append([(left, level), (right, level)])
    return lines


STARTS = {"NF4": shortest(codebook("nf4")), "even steps": shortest(shaped_levels())}


class CodebookExplorer(Explorer):
    """16 levels to drag; their error beside NF4, FP4, INT4 and Lloyd-Max. See Explorer.

    weight: the tensor to try them on, such as a layer of a model, of which 32,768 weights are taken from everywhere;
    None: normal weights. levels: 16 of your own to start from, ascending, in [-1, 1].
    """

    above = ("levels",)

    def __init__(self, weight: torch.Tensor | None = None, **state):
        self._own = weight is not None  # the line to copy names it
        self._runs = some_runs(normal_weights(SAMPLE) if weight is None else weight)  # (n_runs, 1024)
        self._compared: dict[int, dict] = {}  # by block size: all that does not depend on the reader's levels
        super().__init__(**state)

    @property
    def levels(self) -> torch.Tensor:
        """(16,) float32: for `quantize`, and for a Variant of `sweep`."""
        return self.result["levels"]

    def controls(self):
        return {
            "levels": Levels("Levels", STARTS["NF4"], starts=STARTS),
            "block_size": Slider("Block size", 64, choices=[16, 64, 256, LARGEST_BLOCK], unit="weights"),
        }

    def compute(self, state):
        levels = torch.tensor(state["levels"], dtype=torch.float32)  # (16,)
        compared = self._compare(state["block_size"])
        return {"levels": levels, "use": code_use(levels, compared["blocks"]), **compared}

    def _compare(self, block_size: int) -> dict:
        """Return the blocks, the histogram of their scaled weights, and the use of other data types on them."""
        if block_size not in self._compared:
            blocks = self._runs.view(-1, block_size)  # (n_blocks, block_size)
            scaled = scale_blocks(blocks, block_absmax(blocks))  # in [-1, 1]
            fitted = lloyd_max(scaled)  # 50 ms, so results are kept
            tables = {NAMES[name]: codebook(name) for name in COMPARED} | {"Lloyd-Max": fitted}
            self._compared[block_size] = {
                "blocks": blocks,
                "density": torch.histc(scaled, BINS, -1, 1) / scaled.numel(),  # (BINS,), sums to 1
                "fitted": shortest(fitted),
                "others": {name: code_use(table, blocks) for name, table in tables.items()},
            }
        return self._compared[block_size]

    def draw(self):
        fig, ax = new_figure(width=BESIDE, height=4.4)
        ax.remove()  # its place is divided below
        grid = fig.add_gridspec(2, 2, height_ratios=[1, 1.3], width_ratios=[1.1, 1])
        top, left, right = (fig.add_subplot(place) for place in (grid[0, :], grid[1, 0], grid[1, 1]))
        for ax in (top, left, right):
            ax.spines[["top", "right"]].set_visible(False)
        moving = [*self._draw_levels(top), *self._draw_use(left), *self._draw_errors(right)]
        fix_layout(fig)
        ends = top.transData.transform([(-1, 0), (1, 0)])[:, 0] / fig.bbox.width
        self._controls["levels"].span = tuple(ends.tolist())  # a handle stands over its line
        return fig, moving

    def _draw_levels(self, ax: Axes) -> list[Artist]:
        ax.set(xlim=(-1.04, 1.04), ylim=(0, 1.05), yticks=[], xlabel="weight / absmax", ylabel="weights")
        self.density = ax.add_collection(LineCollection([], colors=COLOURS["sky"], lw=4, capstyle="butt"))
        self.lines = ax.add_collection(LineCollection([], colors=COLOURS["blue"], lw=1.8))
        self.note = ax.set_title("better than", loc="left", fontsize=TITLE)
        return [self.density, self.lines, self.note]

    def _draw_use(self, ax: Axes) -> list[Artist]:
        ax.set(xlim=(-0.8, 15.8), ylim=(0, MOST_USED), xlabel="code", ylabel="use, % of weights")
        ax.set_xticks(range(0, 16, 3))
        self.bars = ax.add_collection(LineCollection([], colors=COLOURS["orange"], lw=6, capstyle="butt"))
        (equal,) = ax.plot([-0.8, 15.8], [100 / 16] * 2, color=COLOURS["black"], lw=1, ls="--")
        (self.beyond,) = ax.plot([0], [MOST_USED], "^", ms=8, color=COLOURS["orange"], clip_on=False)
        self.entropy = ax.set_title("bits", loc="left", fontsize=10)
        return [self.bars, equal, self.beyond, self.entropy]

    def _draw_errors(self, ax: Axes) -> list[Artist]:
        names = ["yours", *(NAMES[name] for name in COMPARED), "Lloyd-\nMax"]
        ax.set(yscale="log", ylim=(LEAST, 1.4 * MOST), xlim=(-0.6, len(names) - 0.4), ylabel="relative error, %")
        ax.set_xticks(range(len(names)), names, fontsize=SMALLEST)
        ax.set_yticks([1, 3, 10, 30], ["1", "3", "10", "30"])
        colours = [COLOURS["blue"], *[COLOURS["orange"]] * (len(names) - 1)]
        self.errors = ax.add_collection(LineCollection([], colors=colours, lw=14, capstyle="butt"))
        self.values = [ax.text(i, 1, "", ha="center", va="bottom", fontsize=SMALLEST) for i in range(len(names))]
        return [self.errors, *self.values]

    def update(self, result):
        self._controls["levels"].starts = STARTS | {"Lloyd-Max": result["fitted"]}
        use = result["use"]
        middles = (np.arange(BINS) + 0.5) * 2 / BINS - 1
        self.density.set_segments(bars(middles, result["density"] / result["density"].max()))
        self.lines.set_segments(bars(result["levels"], 1.0))
        share = 100 * use.share.numpy()  # %
        self.bars.set_segments(bars(range(16), np.minimum(share, MOST_USED)))
        over = np.flatnonzero(share > MOST_USED)  # codes whose bars leave the axis
        self.beyond.set_data(over, np.full(len(over), MOST_USED))
        self.entropy.set_text(f"{use.entropy:z.2f} bits of information in 4")
        errors = [100 * other.relative_error for other in (use, *result["others"].values())]  # %
        ends = [min(max(error, LEAST), MOST) for error in errors]
        self.errors.set_segments(bars(range(len(ends)), ends, LEAST))
        for text, error, end in zip(self.values, errors, ends, strict=True):
            text.set_y(1.05 * end)
            text.set_text(f"{error:.2f}" if error <= MOST else f"{error:.0f}↑")
        self.note.set_text(f"Your levels are better than {better_than(use, result['others']) or 'none'}")

    def describe(self, state, result):
        use = result["use"]
        share = 100 * use.share  # %
        others = ", ".join(f"{name} {percent(other.relative_error)}" for name, other in result["others"].items())
        return (
            f"Relative error {percent(use.relative_error)} % ({others}), better than "
            f"{better_than(use, result['others']) or 'none of them'}{IN_DETAIL}"
            f"Levels {' '.join(f'{level:z.3g}' for level in state['levels'])}, blocks of {state['block_size']} "
            f"{'given' if self._own else 'normal'} weights; codes used {share.min():.1f} to {share.max():.1f} % of "
            f"the time, {use.entropy:z.2f} bits of information in 4"
        )

    def code(self):
        weight = "weight, " if self._own else ""
        return super().code().replace("(", f"({weight}", 1)


def better_than(use: CodeUse, others: dict[str, CodeUse]) -> str:
    """Name the data types that leave a larger error."""
    names = [name for name, other in others.items() if use.relative_error < other.relative_error]
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def percent(share: float) -> str:
    """Write three digits of a share, in %, and never an exponent.

    >>> percent(0.00847), percent(28.9)
    ('0.847', '2890')
    """
    return f"{100 * share:.3g}" if share < 9.99 else f"{100 * share:.0f}"
