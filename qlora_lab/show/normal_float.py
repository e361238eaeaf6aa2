"""The NormalFloat explorer: levels under the bell curve, and how often each code is used.

State: bits, offset, symmetric. The picture: above the normal density that the rule assumes, cut off at `offset` and
stretched to [-1, 1], with a line for each level, and pale behind them the levels of NF4; below the share of each code
on normal weights in blocks of 64, against the equal share that the rule aims for.
"""

from functools import partial

import numpy as np
import torch
from matplotlib.collections import LineCollection

from qlora_lab.measure.code_use import code_use
from qlora_lab.measure.codebook_trial import SAMPLE, normal_weights, stretched_density
from qlora_lab.quant.blocks import to_blocks
from qlora_lab.quant.codebook import codebook, normal_float, normal_offset
from qlora_lab.show.explorer import Explorer, fix_layout
from qlora_lab.show.figure import BESIDE, COLOURS, IN_DETAIL, TITLE, bars, new_figure
from qlora_lab.show.slider import Slider, Steps, Toggle

BLOCK_SIZE = 64
RULE = "rule"  # the offset that normal_offset gives for the bits
STEPS = [round(0.8 + 0.005 * i, 3) for i in range(40)]  # 0.8 to 0.995
OFFSETS = (RULE, *sorted([*STEPS, normal_offset(4)]))  # NF4's offset at other widths, too
X = torch.linspace(-1, 1, 201, dtype=torch.float32)  # where the curve is drawn


class NormalFloatExplorer(Explorer):
    """Bits, offset and symmetry of NormalFloat: levels, error and code use. See Explorer for its methods."""

    def controls(self):
        return {
            "bits": Slider("Bits", 4, Steps(2, 6), unit="bits per code"),
            "offset": Slider("Offset", RULE, choices=OFFSETS),
            "symmetric": Toggle("Symmetric", False),
        }

    @staticmethod
    def compute(state):
        offset = normal_offset(state["bits"]) if state["offset"] == RULE else state["offset"]
        levels = normal_float(state["bits"], offset, state["symmetric"])  # (2^bits,)
        use = code_use(levels, to_blocks(normal_weights(SAMPLE), BLOCK_SIZE))
        return {"levels": levels, "offset": offset, "use": use, "density": partial(stretched_density, offset=offset)}

    def draw(self):
        fig, (upper, lower) = new_figure(rows=2, width=BESIDE, height=4)
        upper.set(xlim=(-1.05, 1.05), ylim=(0, 1.1), xlabel="weight / absmax", ylabel="density", yticks=[])
        upper.set_xticks([-1, -0.5, 0, 0.5, 1])
        upper.set_title("Levels lie close where weights are many", loc="left", fontsize=TITLE)
        lower.set(xlabel="code", ylabel="% of weights", ylim=(0, 250 / 2**2))
        nf4 = codebook("nf4")
        ends = zip(nf4, stretched_density(nf4, offset=normal_offset(4)), strict=True)
        ghost = upper.add_collection(LineCollection([[(x, 0), (x, y)] for x, y in ends], colors="#cccccc", lw=6))
        upper.legend([ghost], ["NF4"], loc="upper left", frameon=False)
        (self.curve,) = upper.plot([], [], color=COLOURS["black"], lw=1)
        self.levels = upper.add_collection(LineCollection([], colors=COLOURS["blue"], lw=2))
        self.bars = lower.add_collection(LineCollection([], colors=COLOURS["orange"]))
        (self.equal,) = lower.plot([], [], color=COLOURS["black"], lw=1, ls="--")  # the share that the rule aims for
        self.note = lower.set_title("error", loc="left", fontsize=TITLE)
        self.lower = lower
        fix_layout(fig)  # with the limits of 2 bits, which have the widest labels
        return fig, [self.curve, self.levels, self.bars, self.equal, self.note]

    def update(self, result):
        levels = result["levels"].numpy()
        share = 100 * result["use"].share.numpy()  # %
        self.curve.set_data(X, result["density"](X))
        self.levels.set_segments(bars(levels, result["density"](result["levels"])))
        self.bars.set_segments(bars(np.arange(len(share)), share))
        self.bars.set_linewidth(200 / len(share))  # points: bars do not overlap at 6 bits
        self.lower.set_xlim(-0.8, len(share) - 0.2)
        self.lower.set_ylim(0, 330 / len(share))  # depends on bits alone: each width has a background of its own
        self.equal.set_data([-0.8, len(share)], [100 / len(share)] * 2)
        self.note.set_text(f"Use of the codes; dashed: equal. Error {100 * result['use'].relative_error:.3g} %")

    @staticmethod
    def describe(state, result):
        use = result["use"]
        used = 100 * use.share  # %
        rule = " by the rule" if state["offset"] == RULE else ""
        return (
            f"NormalFloat, {state['bits']} bits, offset {result['offset']:.7g}{rule}: {len(result['levels'])} levels, "
            f"relative error {100 * use.relative_error:.3g} %, {use.entropy:.2f} bits of information in {state['bits']}"
            f"{IN_DETAIL}codes used {used.min():.1f} to {used.max():.1f} % of the time"
        )
