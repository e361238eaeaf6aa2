"""The midpoint explorer: one weight on a level of NF4, a change that is added to it, and the level that is stored.

State: code, change. The picture, in percent of the block's absmax from the weight's own level: above, the change as an
arrow; below, the levels around, the range of sums that keep the old code, and the level where the sum ends.

The weight never becomes the largest of its block: the block's constant stays what it is.
"""

import torch
from matplotlib.collections import LineCollection

from qlora_lab.quant.codebook import codebook, midpoints
from qlora_lab.quant.quantize import dequantize, quantize
from qlora_lab.show.explorer import Explorer, fix_layout
from qlora_lab.show.figure import BESIDE, COLOURS, TITLE, new_figure
from qlora_lab.show.slider import Slider, Steps

LEVELS = codebook("nf4")  # (16,)
REACH = 25  # % of absmax: with it no code of CODES leaves the block's range
CODES = Steps(1, 13)  # the next one lies at 72 %, and a change would make it the largest weight
EDGE = REACH + 12  # of the picture: the level beyond the farthest midpoint


class MidpointExplorer(Explorer):
    """A code, a change, and whether the code moves. See Explorer for its methods."""

    played = "change"

    def controls(self):
        return {
            "code": Slider("Code of the weight", 7, CODES),
            "change": Slider("Change", 3, Steps(-REACH, REACH), unit="% of absmax"),
        }

    @staticmethod
    def compute(state):
        level = LEVELS[state["code"]]
        total = level + state["change"] / 100
        # beside the largest weight of its block
        again = quantize(torch.stack([torch.ones_like(total), total]), "nf4")
        edges = midpoints(LEVELS)  # (15,): edges[i] lies between the levels i and i + 1
        return {
            "level": level.item(),
            "total": total.item(),
            "below": edges[state["code"] - 1].item(),
            "above": edges[state["code"]].item(),
            "code": int(again.codes[1]),
            "stored": dequantize(again)[1].item(),
        }

    def draw(self):
        fig, ax = new_figure(width=BESIDE, height=2.8)
        ax.set(xlim=(-EDGE, EDGE), ylim=(-0.55, 1.6), yticks=[0, 1], xlabel="% of absmax from the weight")
        ax.set_yticklabels(["stored", "weight\n+ change"])
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
        self.kept = ax.add_collection(LineCollection([], colors=COLOURS["sky"], lw=14, alpha=0.5, capstyle="butt"))
        self.levels = ax.add_collection(LineCollection([], colors=COLOURS["black"], lw=2))
        self.edges = ax.add_collection(LineCollection([], colors=COLOURS["black"], lw=1, ls="--"))
        self.change = ax.add_collection(LineCollection([], colors=COLOURS["orange"], lw=4, capstyle="butt"))
        self.falls = ax.add_collection(LineCollection([], colors=COLOURS["blue"], lw=1.5, ls=":"))
        (self.total,) = ax.plot([], [], "D", ms=8, color=COLOURS["orange"])
        (self.stored,) = ax.plot([], [], "o", ms=11, color=COLOURS["blue"])
        self.names = [ax.text(0, -0.28, "", ha="center", va="top", fontsize=10) for _ in LEVELS]
        self.note = ax.set_title("stays", loc="left", fontsize=TITLE)
        fix_layout(fig)
        moving = [self.kept, self.levels, self.edges, self.change, self.falls, self.total, self.stored]
        return fig, [*moving, *self.names, self.note]

    def update(self, result):
        level = result["level"]
        places = [100 * (other - level) for other in LEVELS.tolist()]
        below, above, total, stored = (100 * (result[name] - level) for name in ("below", "above", "total", "stored"))
        self.kept.set_segments([[(below, 0), (above, 0)]])
        self.levels.set_segments([[(x, -0.2), (x, 0.2)] for x in places])
        self.edges.set_segments([[(x, -0.2), (x, 1.3)] for x in (below, above)])
        self.change.set_segments([[(0, 1), (total, 1)]])
        self.falls.set_segments([[(total, 1), (stored, 0)]])
        self.total.set_data([total], [1])
        self.stored.set_data([stored], [0])
        for code, (text, x) in enumerate(zip(self.names, places, strict=True)):
            text.set_x(x)
            text.set_text(str(code) if abs(x) < EDGE else "")
        said = _arrived(result)
        self.note.set_text(said[0].upper() + said[1:])

    @staticmethod
    def describe(state, result):
        low, high = (100 * (result[name] - result["level"]) for name in ("below", "above"))
        return (
            f"A weight at code {state['code']}, a change of {state['change']:+d} % of absmax: {_arrived(result)}; "
            f"the midpoints lie at {low:+.1f} and {high:+.1f} %"
        )


def _arrived(result: dict) -> str:
    moved = 100 * (result["stored"] - result["level"])
    if not moved:
        return "the code stays, and nothing of the change is stored"
    return f"the code becomes {result['code']}, and {moved:+.1f} % is stored"
