"""The kernel map: the bytes, words, codes and constants that a program of rung 2 touches, and the lanes it masks.

State: weights, block_size, tile, program. The picture: above every weight, 32 in a row, eight in a word, two in a byte;
below the eight codes of the last word that the program loads, where an odd tail shows.

The library's own tile is larger than this map.
"""

from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.lines import Line2D

from qlora_lab.gpu_code.touched import touched
from qlora_lab.show.explorer import Explorer, fix_layout
from qlora_lab.show.figure import BESIDE, CLOSE, COLOURS, IN_DETAIL, SMALLEST, TITLE, new_figure
from qlora_lab.show.slider import Slider, Steps

MOST = 256  # weights on the map
ROW = 32  # weights in a row of it
KINDS = {  # kind of lane: colour and mark
    "of another program": ("#dddddd", ""),
    "stored": (COLOURS["sky"], ""),
    "decoded, not stored": (COLOURS["orange"], "."),
    "not loaded": ("#ffffff", "x"),
}


class KernelMapExplorer(Explorer):
    """Weights, block size, tile and program: what one program of a kernel touches. See Explorer for its methods."""

    def controls(self):
        return {
            "weights": Slider("Weights", 203, Steps(1, MOST)),
            "block_size": Slider("Block size", 64, choices=[32, 64, 128], unit="weights"),
            "tile": Slider("Tile", 64, choices=[32, 64, 128], unit="weights a program"),  # whole words
            "program": Slider("Program", 3, Steps(0, MOST // 32 - 1)),
        }

    @staticmethod
    def compute(state):
        return {**state, "touched": touched(**state)}

    def draw(self):
        fig, (upper, lower) = new_figure(rows=2, width=BESIDE, height=4.6, heights=[1, 0.85])
        rows = MOST // ROW
        upper.set(xlim=(0, ROW + 9.5), ylim=(rows, -0.1), xticks=range(0, ROW + 1, 8))
        upper.set_yticks([r + 0.5 for r in range(rows)], [f"{ROW * r}" for r in range(rows)])
        upper.set_xlabel("weights; a tall line ends a word, a short one a byte", loc="left")
        upper.spines[["left", "bottom"]].set_visible(False)  # cells have lines of their own
        upper.tick_params(length=0)
        fill = ["#ffffff", *(colour for colour, _ in KINDS.values())]  # 0 is not a lane
        scale = {"cmap": ListedColormap(fill), "vmin": 0, "vmax": len(KINDS)}
        self.cells = upper.imshow([[0] * ROW] * rows, extent=(0, ROW, rows, 0), aspect="auto", **scale)
        marks = {"ls": "", "ms": 3, "color": COLOURS["black"]}  # colour alone would not do on a grey print
        (self.crosses,), (self.dots,) = (upper.plot([], [], marker=marker, **marks) for marker in "x.")
        ends = [[(x, r), (x, r + (1 if x % 8 == 0 else 0.25))] for r in range(rows) for x in range(0, ROW + 1, 2)]
        lines = upper.add_collection(LineCollection(ends, colors="#777777", lw=0.8))
        self.blocks = upper.add_collection(LineCollection([], lw=3))
        self.names = [upper.text(ROW + 1.4, 0, "", va="center") for _ in range(rows)]
        self.title = upper.set_title("program", loc="left", fontsize=TITLE)
        lower.set_axis_off()
        self.word = lower.set_title("word", loc="left", fontsize=10)
        places = [0.95 - 0.11 * line for line in range(9)]
        font = {"va": "top", "fontsize": SMALLEST, "family": "monospace", "transform": lower.transAxes}
        self.lines = [lower.text(0, y, "", **font) for y in places]
        mark = {"ls": "", "marker": "s", "ms": 9, "mec": "#777777"}
        kinds = [
            (Line2D([], [], mfc=colour, **mark), Line2D([], [], color="k", marker=m, ms=4, ls=""))
            for colour, m in KINDS.values()
        ]
        lower.legend(kinds, KINDS, loc="center right", frameon=False, **CLOSE)
        fix_layout(fig)
        moving = [self.cells, self.crosses, self.dots, lines, self.blocks, *self.names]
        return fig, [*moving, self.title, self.word, *self.lines]

    def update(self, result):
        touched = result["touched"]
        weights = result["weights"]
        block_size = result["block_size"]
        kind = [1] * weights + [0] * (MOST - weights)  # lanes of another program, then no lanes
        for number, lanes in enumerate((touched.stored, touched.spare, touched.idle), 2):
            kind[lanes.start : lanes.stop] = [number] * len(lanes)
        self.cells.set_data([kind[r : r + ROW] for r in range(0, MOST, ROW)])
        for artist, lanes in ((self.dots, touched.spare), (self.crosses, touched.idle)):
            artist.set_data([i % ROW + 0.5 for i in lanes], [i // ROW + 0.5 for i in lanes])
        self._name_blocks(touched, -(-weights // block_size), block_size)
        self._list_last_word(touched, weights, block_size)

    def _name_blocks(self, touched, n_blocks, block_size):
        height = block_size / ROW  # rows of a block
        ends = [[(ROW + 0.7, height * b + 0.1), (ROW + 0.7, height * (b + 1) - 0.1)] for b in range(n_blocks)]
        self.blocks.set_segments(ends)  # beside the cells, a line for each block
        colours = [COLOURS["blue"] if b in touched.constants else "#bbbbbb" for b in range(n_blocks)]
        self.blocks.set_color(colours)
        for b, name in enumerate(self.names):
            name.set_text(f"constant {b}" if b < n_blocks else "")
            name.set_position((ROW + 1.4, height * (b + 0.5)))
            name.set_weight("bold" if b in touched.constants else "normal")

    def _list_last_word(self, touched, weights, block_size):
        rows = []
        for i in range(8 * (touched.words.stop - 1), 8 * touched.words.stop) if touched.words else ():
            half = "low " if i % 2 else "high"  # the first of two weights lies in the high nibble
            byte = "padding" if i // 2 in touched.padding else f"byte {i // 2}"
            rows.append(f"{i:4} {byte:>8} {half} {i // block_size:8} {'yes' if i < weights else 'no':>6}")
        for line, text in zip(self.lines, ["lane     from half constant stored", *rows] if rows else [], strict=False):
            line.set_text(text)
        for line in self.lines[len(rows) + bool(rows) :]:
            line.set_text("")
        self.word.set_text(f"Word {touched.words.stop - 1}, the last one loaded" if rows else "")
        works = f"stores {len(touched.stored)} weights and decodes {len(touched.spare)} in vain"
        self.title.set_text(f"This program {works if rows else 'is not launched'}")

    @staticmethod
    def describe(state, result):
        touched = result["touched"]
        start = f"{state['weights']} weights, blocks of {state['block_size']}, tile {state['tile']}: "
        if not touched.words:
            last = touched.programs - 1
            return f"{start}program {state['program']} is not launched; the last is program {last}"
        return (
            f"{start}program {state['program']} of {touched.programs} loads {_span('word', touched.words)} and "
            f"{_span('constant', touched.constants)}, and stores {_span('weight', touched.stored)}{IN_DETAIL}"
            f"{_span('byte', touched.bytes)} and {len(touched.padding)} of padding; of {state['tile']} lanes "
            f"{len(touched.spare)} decode and do not store, {len(touched.idle)} load nothing"
        )


def _span(name, indices):
    return f"{name} {indices[0]}" if len(indices) == 1 else f"{name}s {indices[0]} to {indices[-1]}"
