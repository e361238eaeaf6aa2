"""The explorer of an answer's speed: how many tokens come in a second, and whether memory or computing limits them.

State: rows (texts at once), context (tokens of each so far), bits (per weight of the layers, constants included).
The picture: tokens per second of all texts together over the number of texts, on two logarithmic axes. One roof is
what memory lets through, the other what the processor computes; a step cannot be above either. They meet at the ridge.
"""

from qlora_lab.memory.answers import Machine, step_work
from qlora_lab.show.explorer import Explorer, fix_layout
from qlora_lab.show.figure import BESIDE, CLOSE, COLOURS, TITLE, new_figure
from qlora_lab.show.slider import Slider

ROUND = Machine(20e9, 400e9)  # round numbers near those of a laptop, so that each machine stores the same picture
ROWS = [2**i for i in range(9)]
CONTEXTS = [2**i for i in range(4, 14)]
BITS = [2.127, 3.127, 4.127, 8.127, 16]  # with double quantization, but for the last


class AnswerSpeedExplorer(Explorer):
    """Texts at once, context and bits: tokens per second under a roofline. See Explorer.

    AnswerSpeedExplorer(rows=8): a LLaMA-7B on a machine of round numbers. model: what shape_of takes; machine: a
    Machine with the rates that you have measured.
    """

    def __init__(self, model="llama-7b", machine: Machine = ROUND, **state):
        self.model, self.machine = model, machine
        super().__init__(**state)

    def controls(self):
        return {
            "rows": Slider("Texts at once", 1, choices=ROWS),
            "context": Slider("Context", 128, choices=CONTEXTS, unit="tokens each"),
            "bits": Slider("Bits per weight", 4.127, choices=BITS),
        }

    def compute(self, state):
        # all of ROWS, since the roofs are drawn as well
        work = step_work(self.model, state["context"], state["bits"])
        times = {rows: work.seconds(self.machine, rows) for rows in ROWS}
        moving, computing = times[state["rows"]]
        return {
            "moving": {rows: rows / each[0] for rows, each in times.items()},  # tokens per second under each roof
            "computing": {rows: rows / each[1] for rows, each in times.items()},
            "rows": state["rows"],
            "step": max(moving, computing),  # seconds
            "limit": "memory" if moving >= computing else "computing",
            "ridge": (ridge := work.ridge(self.machine)),
            "corner": None if ridge is None else (ridge, ridge / work.seconds(self.machine, ridge)[1]),
        }

    def draw(self):
        fig, ax = new_figure(width=BESIDE, height=3.9)
        ax.set(xlim=(ROWS[0] / 1.3, ROWS[-1] * 1.3), ylim=self._range())
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(ROWS, map(str, ROWS))
        ax.yaxis.set_major_formatter("{x:,g}")
        ax.minorticks_off()
        ax.set_xlabel("texts at once")
        ax.set_ylabel("tokens per second, of all texts")
        # a dash tells them apart where colours do not
        (self.memory,) = ax.plot([], [], "--", lw=2, color=COLOURS["blue"], label="memory's roof")
        (self.processor,) = ax.plot([], [], ":", lw=2.5, color=COLOURS["red"], label="computing's roof")
        (self.below,) = ax.plot([], [], lw=3, color=COLOURS["black"], alpha=0.35, label="the lower of both")
        (self.ridge,) = ax.plot([], [], lw=1, color=COLOURS["black"], transform=ax.get_xaxis_transform())
        (self.point,) = ax.plot([], [], "o", ms=11, color=COLOURS["orange"], mec=COLOURS["black"])
        self.name = ax.text(0, 0.02, "", transform=ax.get_xaxis_transform())  # y in parts of the axis
        self.title = ax.set_title("0", loc="left", fontsize=TITLE)
        # below the axes, because some state's lines cross every place inside
        fig.legend(loc="outside lower center", ncols=3, frameon=False, **CLOSE)
        fix_layout(fig)
        return fig, [self.memory, self.processor, self.below, self.ridge, self.point, self.name, self.title]

    def _range(self) -> tuple[float, float]:
        """Tokens per second from the slowest state to well above computing's roof; the axis must not move."""
        # any state of the sliders lies between these two
        slowest = step_work(self.model, CONTEXTS[-1], BITS[-1]).seconds(self.machine, 1)
        _, computing = step_work(self.model, CONTEXTS[0], BITS[0]).seconds(self.machine, 1)
        return 0.5 / max(slowest), 8 / computing

    def update(self, result):
        moving, computing = (list(result[roof].values()) for roof in ("moving", "computing"))
        self.memory.set_data(ROWS, moving)
        self.processor.set_data(ROWS, computing)
        ridge = result["ridge"]
        shown = ridge is not None and ROWS[0] <= ridge <= ROWS[-1]
        self.below.set_data(*_lower(moving, computing, result["corner"]))
        self.ridge.set_data([ridge, ridge] if shown else [], [0, 1] if shown else [])
        # the label stands left of the line where there is no room on its right
        right = shown and ridge < ROWS[-1] / 8
        self.name.set_text("ridge " if shown and not right else " ridge" if shown else "")
        self.name.set_x(ridge if shown else 1)
        self.name.set_ha("left" if right else "right")
        rows = result["rows"]
        self.point.set_data([rows], [rows / result["step"]])
        self.title.set_text(f"{_rate(result)}: {result['limit']} is the limit")

    @staticmethod
    def describe(state, result):
        ridge = result["ridge"]
        where = " for any number of texts" if ridge is None else f"; the ridge is at {ridge:.3g} texts"
        return (
            f"{_texts(state['rows'])} at once, {state['context']} tokens each, {state['bits']:g} bits per weight: "
            f"{_said(result)}{where}"
        )


def _lower(moving: list[float], computing: list[float], corner: tuple[float, float] | None):
    """Return x and y of the lower of two roofs, with the corner where they meet."""
    # both roofs are sampled at ROWS alone: without the corner, a straight line would cut it off
    points = [(rows, min(pair)) for rows, *pair in zip(ROWS, moving, computing, strict=True)]
    inside = [corner] if corner and ROWS[0] < corner[0] < ROWS[-1] else []
    return zip(*sorted(points + inside), strict=True)


def _said(result: dict) -> str:
    step = 1000 * result["step"]  # three digits, and no exponent
    took = f"{step / 1000:.3g} s" if step >= 10_000 else f"{step:,.0f} ms" if step >= 100 else f"{step:.3g} ms"
    return f"{took} a step, {_rate(result)}: {result['limit']} is the limit"


def _rate(result: dict) -> str:
    return f"{result['rows'] / result['step']:.3g} tokens per second"


def _texts(rows: int) -> str:
    return "1 text" if rows == 1 else f"{rows} texts"
