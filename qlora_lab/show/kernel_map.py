"""The kernel map: which program of rung 2 touches which bytes, words, codes and constants, and which lanes are masked.

State: weights, block_size, tile, program. The picture: on the left every weight, 32 in a row, eight in a word, two in a
byte; on the right the last word that the program loads, its eight codes one by one, where an odd tail shows.

The indices are those of _dequantize_nf4_kernel, and tests/show/test_kernel_map.py compares them with the addresses that
the interpreted kernel really uses. The library's own tile is larger than the map.

Not here: values. What a code stands for is in show/normal_float.py.
"""

from dataclasses import dataclass

from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.lines import Line2D

from qlora_lab.show.explorer import Explorer
from qlora_lab.show.figure import COLOURS, new_figure
from qlora_lab.show.slider import Slider, Steps

MOST, ROW = 256, 32  # weights on the map; in a row of it
KINDS = {  # of lanes: colour and mark
    "of another program": ("#dddddd", ""),
    "stored": (COLOURS["sky"], ""),
    "decoded, not stored": (COLOURS["orange"], "."),
    "not loaded": ("#ffffff", "x"),
}


@dataclass(frozen=True)
class Touched:
    """What one program touches, as indices. A lane is one weight of its tile, in the tensor or beyond.

    constants: one for each block that a loaded word lies in. padding: bytes of loaded words behind the packed ones; the
    launcher puts zeros there. stored: weights it writes. spare: lanes decoded from a loaded word and not written. idle:
    lanes whose word is not loaded.
    """

    programs: int
    words: range
    bytes: range
    padding: range
    constants: list[int]
    stored: range
    spare: range
    idle: range


def touched(weights: int, block_size: int, tile: int, program: int) -> Touched:
    """What `program` touches; nothing from the grid's end on, where no program is launched."""
    programs, n_words, n_bytes = -(-weights // tile), -(-weights // 8), -(-weights // 2)
    first = program * (tile // 8)
    end = first + tile // 8 if program < programs else first
    words = range(first, max(first, min(end, n_words)))  # mask: at < n_words
    packed = max(4 * first, min(4 * words.stop, n_bytes))
    stop = max(8 * first, min(8 * words.stop, weights))  # mask: to < numel
    return Touched(
        programs=programs,
        words=words,
        bytes=range(4 * first, packed),
        padding=range(packed, 4 * words.stop),
        constants=sorted({word // (block_size // 8) for word in words}),
        stored=range(8 * first, stop),
        spare=range(stop, 8 * words.stop),
        idle=range(8 * words.stop, 8 * end),
    )


class KernelMapExplorer(Explorer):
    """Weights, block size, tile and program: what one program of a kernel touches. See Explorer for what it can do."""

    def controls(self):
        return {
            "weights": Slider("Weights", 203, Steps(1, MOST)),
            "block_size": Slider("Block size", 64, choices=[32, 64, 128], unit="weights"),
            "tile": Slider("Tile", 64, choices=[32, 64, 128], unit="weights a program"),
            "program": Slider("Program", 3, Steps(0, MOST // 32 - 1)),
        }

    @staticmethod
    def compute(state):
        return {**state, "touched": touched(**state)}

    def draw(self):
        fig, (left, right) = new_figure(2, width=8.5, height=3.4)
        rows = MOST // ROW
        left.set(
            xlim=(0, ROW + 11), ylim=(rows, -0.1), xticks=range(0, ROW + 1, 8), yticks=[r + 0.5 for r in range(rows)]
        )
        left.set_yticklabels([f"{ROW * r}" for r in range(rows)])
        left.set_xlabel("weights; a tall line ends a word, a short one a byte", x=ROW / 2 / (ROW + 11))
        left.spines[["left", "bottom"]].set_visible(False)
        left.tick_params(length=0)
        fill = ["#ffffff", *(colour for colour, _ in KINDS.values())]  # first what is no lane at all
        self.cells = left.imshow(
            [[0] * ROW] * rows,
            extent=(0, ROW, rows, 0),
            cmap=ListedColormap(fill),
            vmin=0,
            vmax=len(KINDS),
            aspect="auto",
        )
        marks = {"ls": "", "ms": 3, "color": COLOURS["black"]}
        (self.crosses,), (self.dots,) = (left.plot([], [], marker=marker, **marks) for marker in "x.")
        ends = [[(x, r), (x, r + (1 if x % 8 == 0 else 0.25))] for r in range(rows) for x in range(0, ROW + 1, 2)]
        lines = left.add_collection(LineCollection(ends, colors="#777777", lw=0.8))
        self.blocks = left.add_collection(LineCollection([], lw=3))
        self.names = [left.text(ROW + 1.4, 0, "", va="center", fontsize=10) for _ in range(rows)]
        right.set_axis_off()
        self.title = right.text(0, 1, "", transform=right.transAxes, va="top", fontsize=11.5, weight="bold")
        places = [0.9 - 0.08 * line for line in range(9)]
        self.lines = [
            right.text(0, y, "", transform=right.transAxes, va="top", fontsize=11.5, family="monospace") for y in places
        ]
        mark = {"ls": "", "marker": "s", "ms": 9, "mec": "#777777"}
        kinds = [
            (Line2D([], [], mfc=colour, **mark), Line2D([], [], color="k", marker=m, ms=4, ls=""))
            for colour, m in KINDS.values()
        ]
        right.legend(
            kinds,
            KINDS,
            loc="lower left",
            ncols=2,
            frameon=False,
            fontsize=10,
            borderaxespad=0,
            handletextpad=0.3,
            columnspacing=1.2,
        )
        moving = [self.cells, self.crosses, self.dots, lines, self.blocks, *self.names, self.title, *self.lines]
        return fig, moving

    def update(self, result):
        found, weights, block_size = result["touched"], result["weights"], result["block_size"]
        kind = [1] * weights + [0] * (MOST - weights)
        for number, lanes in enumerate((found.stored, found.spare, found.idle), 2):
            kind[lanes.start : lanes.stop] = [number] * len(lanes)
        self.cells.set_data([kind[r : r + ROW] for r in range(0, MOST, ROW)])
        for artist, lanes in ((self.dots, found.spare), (self.crosses, found.idle)):
            artist.set_data([i % ROW + 0.5 for i in lanes], [i // ROW + 0.5 for i in lanes])
        self._name_blocks(found, -(-weights // block_size), block_size)
        self._list_last_word(found, weights, block_size)

    def _name_blocks(self, found, n_blocks, block_size):
        height = block_size / ROW
        ends = [[(ROW + 0.7, height * b + 0.1), (ROW + 0.7, height * (b + 1) - 0.1)] for b in range(n_blocks)]
        self.blocks.set_segments(ends)
        colours = [COLOURS["blue"] if b in found.constants else "#bbbbbb" for b in range(n_blocks)]
        self.blocks.set_color(colours)
        for b, name in enumerate(self.names):
            name.set_text(f"constant {b}" if b < n_blocks else "")
            name.set_position((ROW + 1.4, height * (b + 0.5)))
            name.set_weight("bold" if b in found.constants else "normal")

    def _list_last_word(self, found, weights, block_size):
        rows = []
        for i in range(8 * (found.words.stop - 1), 8 * found.words.stop) if found.words else ():
            half = "low " if i % 2 else "high"
            byte = "padding" if i // 2 in found.padding else f"byte {i // 2}"
            rows.append(f"{i:4} {byte:>9} {half} {i // block_size:8} {'yes' if i < weights else 'no':>6}")
        for line, text in zip(self.lines, ["lane      from half constant stored", *rows] if rows else [], strict=False):
            line.set_text(text)
        for line in self.lines[len(rows) + bool(rows) :]:
            line.set_text("")
        last = f"Word {found.words.stop - 1}, the last one loaded" if rows else "This program is not launched"
        self.title.set_text(last)

    @staticmethod
    def describe(state, result):
        found = result["touched"]
        start = (
            f"{state['weights']} weights, block size {state['block_size']}, tile {state['tile']}: "
            f"program {state['program']} of {found.programs} "
        )
        if not found.words:
            return f"{start}is not launched"
        return (
            f"{start}loads {_span('word', found.words)}, which is {_span('byte', found.bytes)} and "
            f"{len(found.padding)} of padding, and {_span('constant', found.constants)}; it stores "
            f"{_span('weight', found.stored)}; of {state['tile']} lanes {len(found.spare)} decode and do not "
            f"store, {len(found.idle)} load nothing"
        )


def _span(name, indices):
    return f"{name} {indices[0]}" if len(indices) == 1 else f"{name}s {indices[0]} to {indices[-1]}"
