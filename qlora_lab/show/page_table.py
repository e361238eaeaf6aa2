"""The page table explorer: the pages of an adapter's AdamW state that are in frames, at any time of three steps.

State: budget, page_size, r, bits, time. The picture: on the left every page of the state of LLaMA-7B's adapter, in the
order in which a step asks for them; on the right the frames, coloured by the time of the last request for their page;
both numbered row by row. Below, the faults of a step for every budget up to this one: a cliff where the last page gets
a frame.

It shows what Pages does if nothing is fetched ahead; tests/show/test_page_table.py compares the two.
"""

import math

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.lines import Line2D

from qlora_lab.memory import paging_trace as trace
from qlora_lab.show.explorer import Explorer
from qlora_lab.show.figure import BESIDE, CLOSE, COLOURS, IN_DETAIL, SMALLEST, TITLE, all_masked, new_figure
from qlora_lab.show.slider import Slider, Steps

MIB = 2**20
NUMBERED = 15  # rows of a grid with the number of their first cell: more of them would touch
BUDGETS = Steps(16, 1280, 16)  # MiB
# left, bottom, width and height of both grids, the key and the cliff, as shares of the figure
PLACES = [(0.08, 0.51, 0.4, 0.43), (0.58, 0.51, 0.4, 0.43), (0.03, 0.36, 0.95, 0.13), (0.12, 0.09, 0.82, 0.2)]
KINDS = {  # kind of page: colour and mark
    "zero, not asked for yet": ("#ffffff", ""),
    "in the file": ("#cccccc", ""),
    "in a frame": (COLOURS["sky"], ""),
    "asked for, in a frame": (COLOURS["green"], "o"),
    "asked for, a fault": (COLOURS["orange"], "P"),
    "leaves for it": (COLOURS["red"], "X"),
}
ZERO, FILE, FRAME, HIT, FAULT, LEAVES = range(len(KINDS))
AGES = matplotlib.colormaps["cividis"]  # of frames: 0 leaves next, 1 was used last


class Grid:
    """A panel filled with any number of cells, in reading order: an image, lines around the cells, a title, and the
    number of the first cell in some of the rows."""

    def __init__(self, ax: Axes, colours: matplotlib.colors.Colormap, most: float):
        ax.set(xlim=(0, 1), ylim=(1, 0))
        ax.set_axis_off()
        scale = {"cmap": colours, "vmin": 0, "vmax": most, "interpolation": "nearest", "aspect": "auto"}
        self.image = ax.imshow([[0]], extent=(0, 1, 1, 0), **scale)
        self.lines = ax.add_collection(LineCollection([], colors="#777777"))
        self.title = ax.set_title("pages", loc="left", fontsize=10)
        font = {"ha": "right", "va": "center", "fontsize": SMALLEST}
        self.numbers = [ax.text(-0.03, 0, "", **font) for _ in range(NUMBERED)]
        self.artists = [self.image, self.lines, self.title, *self.numbers]

    def show(self, values: np.ndarray, title: str) -> None:
        """Show a cell for each value; a masked value is white. Few cells stay small."""
        count = len(values)
        self.columns = max(10, math.ceil(math.sqrt(count)))  # about square
        self.rows = max(10, -(-count // self.columns))
        cells = all_masked((self.rows, self.columns))
        cells.flat[:count] = values  # the others stay white
        self.image.set_data(cells)
        full, rest = divmod(count, self.columns)  # full rows, and cells in the last row
        # lines stop at the last cell: cells down each upright line, cells along each level line
        high = [full + (column <= rest and rest > 0) for column in range(self.columns + 1)]
        wide = [rest if row > full else self.columns if full else rest for row in range(full + (rest > 0) + 1)]
        upright = [[(x / self.columns, 0), (x / self.columns, y / self.rows)] for x, y in enumerate(high)]
        level = [[(0, y / self.rows), (x / self.columns, y / self.rows)] for y, x in enumerate(wide)]
        self.lines.set_segments(upright + level)
        self.lines.set_linewidth(0.8 if count < 400 else 0.2)  # else lines would hide small cells
        self.title.set_text(title)
        step = -(-self.rows // NUMBERED)  # rows from one number to the next
        for place, text in enumerate(self.numbers):
            first = place * step * self.columns
            text.set_text(str(first) if first < count else "")
            text.set_y((place * step + 0.5) / self.rows)

    def centre(self, cell: int) -> tuple[list[float], list[float]]:
        return [(cell % self.columns + 0.5) / self.columns], [(cell // self.columns + 0.5) / self.rows]


class PageTableExplorer(Explorer):
    """Budget, page size, r, bits and time: where each page of LLaMA-7B's adapter state is. See Explorer."""

    played = "time"

    def controls(self):
        return {
            "budget": Slider("Budget", 256, BUDGETS, unit="MiB"),
            "page_size": Slider("Page size", 2, choices=[0.5, 1, 2, 4, 8], unit="MiB"),
            "r": Slider("r", 16, Steps(1, 64)),
            "bits": Slider("Moments", 32, choices=[8, 32], unit="bits"),
            "time": Slider("Time", 1.4, Steps(0.0, 3.0, 0.05), unit="steps"),
        }

    @staticmethod
    def compute(state):
        numels = trace.adapter(trace.LLAMA_7B, state["r"])
        page_size = int(state["page_size"] * MIB)  # bytes
        count = trace.state_pages(numels, state["bits"], page_size)
        frames = min(count, state["budget"] * MIB // page_size)
        asked = [i % count for i in range(round(state["time"] * count))]  # pages in order, step after step
        accesses, table = trace.replay(asked, frames)
        faults = trace.faults_of_a_step(range(count), frames)
        return {
            "bytes": trace.state_bytes(numels, state["bits"]),
            "pages": count,
            "frames": frames,
            "asked": len(set(asked)),  # pages that are no longer zero
            "last": accesses[-1] if accesses else None,
            "table": table,  # page -> frame, least recently used first
            "faults": faults,  # in each step after the first
            "budget": state["budget"],  # MiB
            "whole": count * page_size / MIB,  # MiB: a frame for each page, and no faults; below it all pages fault
            "moved": 2 * faults * page_size,  # bytes: each fault writes one page back and fetches one
            "pageable": trace.pageable_share(numels),  # in bitsandbytes
        }

    def draw(self):
        fig, (left, right, key, cliff) = new_figure(4, width=BESIDE, height=5.2)
        fig.set_layout_engine("none")  # nothing here depends on a state
        for axis, place in zip((left, right, key, cliff), PLACES, strict=True):
            axis.set_position(place)
        self.pages = Grid(left, ListedColormap([colour for colour, _ in KINDS.values()]), len(KINDS) - 1)
        self.frames = Grid(right, AGES, 1)
        mark = {"ls": "", "ms": 6, "mfc": COLOURS["black"], "mec": "#ffffff"}
        markers = [marker for _, marker in KINDS.values()]
        self.marks = {kind: left.plot([], [], marker=markers[kind], **mark)[0] for kind in (HIT, FAULT, LEAVES)}
        (self.used,) = right.plot([], [], marker=markers[FAULT], **mark)
        _key(key, mark)
        self._draw_cliff(cliff)
        moving = [*self.pages.artists, *self.frames.artists, *self.marks.values(), self.used]
        return fig, [*moving, self.cliff, self.here, self.note]

    def _draw_cliff(self, ax: Axes) -> None:
        ax.set(xlim=(0, BUDGETS.high), ylim=(0, 110), xlabel="budget, MiB", ylabel="faults, %")
        ax.set_xticks(range(0, BUDGETS.high + 1, 256))
        ax.set_yticks([0, 50, 100])
        (self.cliff,) = ax.plot([], [], color=COLOURS["orange"], lw=2)
        (self.here,) = ax.plot([], [], "o", ms=9, color=COLOURS["black"], clip_on=False)
        self.note = ax.set_title("faults", loc="left", fontsize=TITLE)

    def update(self, result):
        table = result["table"]
        last = result["last"]
        kinds = np.full(result["pages"], ZERO)
        kinds[: result["asked"]] = FILE  # unless a frame holds them
        kinds[list(table)] = FRAME
        now = {} if last is None else {FAULT if last.fault else HIT: last.page}
        if last is not None and last.evicted is not None:
            now[LEAVES] = last.evicted
        for kind, page in now.items():
            kinds[page] = kind  # after FRAME, which it replaces
        self.pages.show(kinds, f"{_number(result['pages'], 'page')}, {len(table)} of them in frames")
        for kind, mark in self.marks.items():
            mark.set_data(*self.pages.centre(now[kind]) if kind in now else ([], []))
        ages = all_masked(result["frames"])
        ages[list(table.values())] = 1 - np.linspace(0, 1, len(table))[::-1]  # a single page was used last
        self.frames.show(ages, _number(result["frames"], "frame"))
        self.used.set_data(*([], []) if last is None else self.frames.centre(last.frame))
        whole = result["whole"]
        budget = result["budget"]
        # up to the budget: what a larger one would do is for the reader to predict
        ends = [whole, whole, budget] if budget >= whole else [budget] * 3
        self.cliff.set_data([0, *ends], [100, 100, *[0 if budget >= whole else 100] * 2])  # % of the pages
        self.here.set_data([result["budget"]], [100 if result["faults"] else 0])
        self.note.set_text(
            f"{result['frames']} frames for {_number(result['pages'], 'page')}: {result['faults']} faults in a step"
        )

    @staticmethod
    def describe(state, result):
        last = result["last"]
        now = "nothing has been asked for"
        if last is not None:
            left = "" if last.evicted is None else f", and page {last.evicted} leaves"
            now = f"page {last.page} is asked for{', a fault' if last.fault else ', in a frame'}{left}"
        return (
            f"At time {state['time']:g} {now}; {result['faults']} faults in each step after the first{IN_DETAIL}"
            f"LLaMA-7B, r={state['r']}, moments of {state['bits']} bits: {result['bytes'] / MIB:.1f} MiB of state in "
            f"{_number(result['pages'], 'page')} of {state['page_size']:g} MiB, a budget of {state['budget']} MiB with "
            f"{_number(result['frames'], 'frame')}; each later step moves {result['moved'] / MIB:g} MiB, and nothing "
            f"is fetched ahead; bitsandbytes can page {100 * result['pageable']:.0f} % of the state"
        )


def _key(ax: Axes, mark: dict) -> None:
    """Explain both grids: three columns, the last one for the frames."""
    ax.set_axis_off()
    square = {"ls": "", "marker": "s", "ms": 9, "mec": "#777777"}
    kinds = [
        (Line2D([], [], mfc=colour, **square), Line2D([], [], marker=marker, **mark))
        for colour, marker in KINDS.values()
    ]
    ages = [Line2D([], [], mfc=colour, **square) for colour in (AGES(1.0), AGES(0.0), "#ffffff")]
    ages[0] = (ages[0], kinds[FAULT][1])
    names = [*KINDS, "asked for last", "leaves next", "free"]
    ax.legend([*kinds, *ages], names, loc="center left", ncols=3, frameon=False, fontsize=SMALLEST, **CLOSE)


def _number(count: int, name: str) -> str:
    return f"{count} {name}{'s' * (count != 1)}"
