"""The constants explorer: bytes of constants beside those of their weights, and the error of storing them smaller.

State: block_size, group_size, outlier, mean_offset. The picture: above the bytes of 2,048 weights, before and after
double quantization, a cell for each byte and 32 in a column, so that the axis shows bits per parameter; below the
shift of the weights by each table of 8 bits, as a share of the squared error of NF4 itself.
"""

from functools import lru_cache

import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.patches import Patch

from qlora_lab.measure.codebook_trial import normal_weights
from qlora_lab.measure.constants import TABLES, squared_error, stored_constants
from qlora_lab.memory.published import constant_bits
from qlora_lab.quant.quantize import QuantizedTensor, dequantize, quantize
from qlora_lab.show.explorer import Explorer, fix_layout
from qlora_lab.show.figure import BESIDE, CLOSE, COLOURS, IN_DETAIL, TITLE, bars, new_figure
from qlora_lab.show.slider import Slider, Toggle

SIZES = [16, 32, 64, 128, 256, 512]
CODES = 4  # bits of a weight's own code
ROWS = 32  # bytes in a column
PER_BIT = 8  # columns, which makes 2,048 weights
WIDEST = CODES + 32 // SIZES[0]  # bits per parameter: float32 constants of the smallest blocks
N_WEIGHTS = 2**18  # they fill the largest group of the largest blocks
OUTLIER_EVERY = 2**14  # weights: at block size 64 one constant of 256, one in each group
NAMES = {"dynamic": "dynamic", "int8": "int8", "e4m3": "E4M3", "e5m2": "E5M2"}
LEAST, MOST = 1e-3, 1e3  # the axis, logarithmic: % of NF4's error
HIGH = 5  # the factor on it that a number is high


@lru_cache(maxsize=4)  # for a slider that moves back and forth; each holds 1 MB
def quantised(block_size: int, outlier: int) -> tuple[QuantizedTensor, torch.Tensor, float, float]:
    """Quantise 2^18 normal weights, always the same, to NF4, after `outlier` has replaced one in 16,384.

    Returns the result, the same dequantised, its squared error, and the sum of the squared weights.
    """
    weight = normal_weights(N_WEIGHTS).clone()
    weight[::OUTLIER_EVERY] = outlier
    q = quantize(weight, block_size=block_size)
    return q, dequantize(q), squared_error(weight, q), weight.square().sum().item()


def cells(start: float, stop: float) -> list[list[tuple[float, float]]]:
    """Outline the bytes from number `start` to `stop`, fractions too, column by column; x in bits per parameter."""
    outlines = []
    while start < stop:
        column, top = divmod(start, ROWS)
        bottom = min(ROWS, top + stop - start)
        left = column / PER_BIT
        right = (column + 1) / PER_BIT
        outlines.append([(left, top), (right, top), (right, bottom), (left, bottom)])  # clockwise
        start += bottom - top
    return outlines


class Bytes:
    """The bytes of 2,048 weights on an axis of bits per parameter: codes, then constants, then scales of constants."""

    def __init__(self, ax: Axes):
        byte_lines = [[(x / PER_BIT, 0), (x / PER_BIT, ROWS - 0.5)] for x in range(WIDEST * PER_BIT)]
        byte_lines += [[(0, y), (WIDEST, y)] for y in range(ROWS)]
        ax.set(xlim=(0, WIDEST), ylim=(ROWS, 0), yticks=[], xticks=range(WIDEST + 1))
        ax.spines["left"].set_visible(False)
        codes = PolyCollection(cells(0, CODES * PER_BIT * ROWS), facecolors=COLOURS["sky"])
        self.constants = ax.add_collection(PolyCollection([], facecolors=COLOURS["orange"]))
        self.scales = ax.add_collection(PolyCollection([], facecolors=COLOURS["red"]))
        self.title = ax.set_title("bits", loc="left", fontsize=TITLE)
        lines = LineCollection(byte_lines, colors="#ffffff", lw=0.4)
        self.artists = [ax.add_collection(codes), self.constants, self.scales, ax.add_collection(lines), self.title]

    def show(self, constants: float, scales: float, title: str) -> None:
        """constants, scales: bits per parameter. Less than a byte fills a part of a cell."""
        ends = [PER_BIT * ROWS * bits for bits in (CODES, CODES + constants, CODES + constants + scales)]
        self.constants.set_verts(cells(*ends[:2]))
        self.scales.set_verts(cells(*ends[1:]))
        self.title.set_text(title)


class ConstantsExplorer(Explorer):
    """Both block sizes, outliers and the mean: what constants cost in bits and in error. See Explorer."""

    def controls(self):
        return {
            "block_size": Slider("Block size", 64, choices=SIZES, unit="weights"),
            "group_size": Slider("Group size", 256, choices=SIZES, unit="constants"),
            "outlier": Slider("Outlier", 0, choices=[0, 5, 10, 20, 40, 80], unit="standard deviations"),
            "mean_offset": Toggle("Mean offset", True),
        }

    @staticmethod
    def compute(state):
        before, after = constant_bits(state["block_size"], state["group_size"])
        q, nf4, error, squares = quantised(state["block_size"], state["outlier"])
        moved = {}
        for table in TABLES:
            absmax = stored_constants(q.absmax, table, state["group_size"], state["mean_offset"])  # (n_blocks,)
            moved[table] = squared_error(nf4, q, absmax) / error
        return {
            "before": before,  # bits per parameter of float32 constants
            "after": after,  # and after double quantization
            "codes": before / 4,  # 8 bits for 32
            "relative_error": error / squares,
            "moved": moved,  # table -> share of the error
        }

    def draw(self):
        fig, (before, after, below) = new_figure(rows=3, width=BESIDE, height=5.4)
        self.before, self.after = Bytes(before), Bytes(after)
        after.set_xlabel("bits per parameter")
        kinds = [Patch(color=COLOURS[name]) for name in ("sky", "orange", "red")]
        names = ["codes", "constants", "their scales"]
        fig.legend(kinds, names, loc="outside upper right", ncols=3, frameon=False, **CLOSE)
        below.set(yscale="log", ylim=(LEAST, MOST), xlim=(-0.6, len(TABLES) - 0.4), ylabel="% of NF4's error")
        below.set_xticks(range(len(TABLES)), NAMES.values())
        below.set_yticks([LEAST, 1, MOST], ["0.001", "1", "1000"])  # an exponent would be too small to read
        below.axhline(100, color=COLOURS["black"], lw=1, ls="--")  # as large as NF4's own error
        self.bars = below.add_collection(LineCollection([], colors=COLOURS["orange"], lw=20, capstyle="butt"))
        self.values = [below.text(i, 1, "", ha="center", va="bottom", fontsize=10) for i in range(len(TABLES))]
        self.note = below.set_title("shift", loc="left", fontsize=TITLE)
        fix_layout(fig)
        return fig, [*self.before.artists, *self.after.artists, self.bars, *self.values, self.note]

    def update(self, result):
        before = result["before"]
        codes = result["codes"]
        scales = result["after"] - codes
        self.before.show(before, 0, f"Constants in float32: {CODES} + {before:.4g} bits")
        self.after.show(codes, scales, f"In 8 bits: {CODES} + {codes:.4g} + {scales:.3g} bits")
        moved = [100 * share for share in result["moved"].values()]  # %
        self.bars.set_segments(bars(range(len(moved)), moved, LEAST))
        for text, value in zip(self.values, moved, strict=True):
            # above the dashed line if the number would stand on it
            text.set_y(115 if 100 / HIGH < 1.15 * value < 115 else 1.15 * value)
            text.set_text(f"{value:.2g}")
        self.note.set_text(f"Squared shift by 8 bits, beside NF4's error of {100 * result['relative_error']:.3g} %")

    @staticmethod
    def describe(state, result):
        moved = ", ".join(f"{NAMES[table]} {100 * share:.2g} %" for table, share in result["moved"].items())
        cost = f"Constants: {result['after']:.4g} bits per parameter, not {result['before']:.4g}"
        mean = "taken off" if state["mean_offset"] else "left in"
        return (
            f"{cost}; shifts in percent of NF4's error: {moved}{IN_DETAIL}blocks of {state['block_size']}, groups of "
            f"{state['group_size']}, outliers of {state['outlier']}, the mean {mean}: relative error of NF4 "
            f"{100 * result['relative_error']:.3g} %"
        )
