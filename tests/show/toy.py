"""The smallest honest explorer: round 1,000 normal numbers to 2^bits steps. It needs nothing of the library's maths."""

import numpy as np

from qlora_lab.show.explorer import Explorer
from qlora_lab.show.figure import COLOURS, new_figure
from qlora_lab.show.slider import Slider, Steps, Toggle

SAMPLE = np.sort(np.random.default_rng(0).standard_normal(1000))


def step_width(bits):
    return 6.0 / 2**bits


class RoundingExplorer(Explorer):
    def controls(self):
        return {
            "bits": Slider("Bits", 4, Steps(1, 8)),
            "offset": Slider("Offset", 0.25, Steps(0.0, 0.5, 0.1), unit="steps"),
            "mode": Slider("Mode", "round", choices=["round", "floor"]),
            "clip": Toggle("Clip outliers", True),
        }

    @staticmethod
    def compute(state):
        width, snap = step_width(state["bits"]), {"round": np.round, "floor": np.floor}[state["mode"]]
        x = np.clip(SAMPLE, -3, 3) if state["clip"] else SAMPLE
        y = (snap(x / width - state["offset"]) + state["offset"]) * width
        return {"y": y, "rmse": float(np.sqrt(np.mean((SAMPLE - y) ** 2)))}

    def draw(self):
        fig, ax = new_figure()
        ax.set(xlim=(-3.5, 3.5), ylim=(-3.5, 3.5), xlabel="weight", ylabel="rounded weight")
        ax.plot(SAMPLE, SAMPLE, color=COLOURS["black"], lw=1, label="exact")
        (self.line,) = ax.plot([], [], color=COLOURS["blue"], label="rounded")
        ax.legend(loc="upper left", frameon=False)
        self.title = ax.set_title(" ")
        return fig, [self.line, self.title]

    def update(self, result):
        self.line.set_data(SAMPLE, result["y"])
        self.title.set_text(f"RMSE {result['rmse']:.4f}")

    @staticmethod
    def describe(state, result):
        return f"Rounding explorer: {2 ** state['bits']} steps, RMSE {result['rmse']:.4f}"
