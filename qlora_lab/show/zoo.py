"""The explorer of methods: for one size, what each of them learns, needs for a step, and adds to reading a row.

State: model, method, size, layers, four_bit, length. The picture has a row for each method, with the chosen one in
orange, and three axes: trainable parameters, the peak of a training step (memory/predict.py), and the operations of
reading a row as a multiple of the base's (memory/work.py). All three are formulas: nothing is measured.

`size` is LoRA's rank, the width of a Houlsby bottleneck, and the tokens of a prefix or a prompt. The step keeps all
activations, because a prefix does not go with gradient checkpointing.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from qlora_lab.memory.predict import predict_memory
from qlora_lab.memory.setup import Setup
from qlora_lab.memory.shape import PUBLISHED, Shape, shape_of
from qlora_lab.memory.work import nothing_added, work
from qlora_lab.show.explorer import Explorer, fix_layout
from qlora_lab.show.figure import BESIDE, COLOURS, IN_DETAIL, SMALLEST, TITLE, new_figure
from qlora_lab.show.slider import Slider, Toggle

GIB = 2**30
# methods as add_adapter calls them: names in the picture, in the order of its rows
NAMES = {"full": "full", "lora": "LoRA", "houlsby": "Houlsby", "prefix": "prefix", "prompt": "prompt"}
NAMES |= {"zero_bias": "biases"}
# what `size` means; full fine-tuning and biases have no size
SIZES = {"lora": "rank {}", "houlsby": "bottleneck {}", "prefix": "{} token{}", "prompt": "{} token{}"}
LAYERS = {  # of LoRA alone: the others have places of their own
    "q and v": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "feed-forward": ("gate_proj", "up_proj", "down_proj"),
    "all": "all-linear",
}
LONGEST = {"llama-2-70b": 4096, "llama-3-8b": 8192}  # tokens of a context; the first LLaMA was trained with 2048
# Limits hold every state, so that axes stay where they are: tests try the extremes. Logarithms, because full
# fine-tuning would press all other methods into the corner.
PANELS = {  # field of a result: title, limits of its axis, and its marks with their names
    "trained": ("trainable parameters", (3e3, 3e14), {1e4: "10 k", 1e7: "10 M", 1e10: "10 G"}),
    "peak": ("memory of a step, GiB", (1.5 * GIB, 6e4 * GIB), {4 * GIB: "4", 32 * GIB: "32", 256 * GIB: "256"}),
    "work": ("work, base = 1", (0.9, 60), {1: "1", 2: "2", 4: "4", 8: "8", 16: "16"}),
}


def costs(shape: Shape, method: str, options: dict) -> dict[str, float | bool]:
    """Return trained (parameters), peak (bytes of a step) and work (a multiple of the base's) of one method.

    fits: whether the row, and the virtual tokens before it, fit into the model's context.
    """
    if method == "lora" and options["codebook"] != "none":
        method = "qlora"  # the ledger's name for LoRA beside packed weights
    setup = Setup(method=method, **options)
    ledger = predict_memory(shape, method, **options)
    # full fine-tuning has no adapter, hence no such row
    learned = sum(row.count for row in ledger.rows if row.group == "adapters")
    return {
        "trained": shape.parameters if method == "full" else learned,
        "peak": ledger.peak,
        "work": work(shape, setup, setup.length) / nothing_added(shape, setup, setup.length),
        "fits": setup.key_length <= LONGEST.get(shape.name, 2048),
    }


class ZooExplorer(Explorer):
    """Method, size and layers: what each costs. See Explorer."""

    def controls(self):
        return {
            "model": Slider("Model", "llama-7b", choices=sorted(PUBLISHED, key=lambda name: shape_of(name).parameters)),
            "method": Slider("Method", "lora", choices=list(NAMES)),
            "size": Slider("Size", 16, choices=[1, 2, 4, 8, 16, 32, 64, 128, 256]),
            "layers": Slider("LoRA's layers", "all", choices=list(LAYERS)),
            "four_bit": Toggle("4-bit base", True),
            "length": Slider("Length of a row", 256, choices=[2**i for i in range(4, 12)], unit="tokens"),
        }

    @staticmethod
    def compute(state):
        size = state["size"]
        options = {"r": size, "size": size, "virtual_tokens": size, "targets": LAYERS[state["layers"]]}
        options |= {"length": state["length"], "batch_size": 1, "codebook": "nf4" if state["four_bit"] else "none"}
        shape = shape_of(state["model"])
        # all methods, a fifth of a millisecond each: the picture compares them
        found = {method: costs(shape, method, options) for method in NAMES}
        return {"costs": found, "chosen": state["method"], "parameters": shape.parameters}

    def draw(self):
        fig, axes = new_figure(3, width=BESIDE, height=3.4)
        self.dots = []
        self.lines = []
        self.texts = []
        for ax, (title, limits, marks) in zip(axes, PANELS.values(), strict=True):
            _prepare(ax, title, limits, marks, named=ax is axes[0])
            self.lines.append(ax.add_collection(LineCollection([], lw=2)))
            self.dots.append([ax.plot([], [], "o", ms=9)[0] for _ in NAMES])
            self.texts.append([ax.text(1, y, "", va="center", fontsize=SMALLEST) for y in range(len(NAMES))])
        self.title = fig.suptitle("learns", x=0.01, ha="left", fontsize=TITLE)
        fix_layout(fig)  # the numbers beside the dots would move the axes
        moving = [artist for dots, texts in zip(self.dots, self.texts, strict=True) for artist in (*dots, *texts)]
        return fig, [*self.lines, *moving, self.title]

    def update(self, result):
        # never by colour alone: the sentence below the picture names the method
        colours = [COLOURS["orange" if method == result["chosen"] else "blue"] for method in NAMES]
        for panel, field in enumerate(PANELS):
            low, _ = PANELS[field][1]
            rows = [result["costs"][method] for method in NAMES]
            # a row that does not fit can be neither learned nor read; its parameters are there
            drawn = [row[field] if row["fits"] or field == "trained" else low for row in rows]
            # from the edge, which is not zero on a logarithmic axis: the eye follows the row to its name
            self.lines[panel].set_segments([[(low, y), (value, y)] for y, value in enumerate(drawn)])
            self.lines[panel].set_color(colours)
            for y, value in enumerate(drawn):
                self.dots[panel][y].set_data(*([value], [y]) if value > low else ([], []))
                self.dots[panel][y].set_color(colours[y])
                self.texts[panel][y].set_x(value * _room(field))
                self.texts[panel][y].set_text(_label(field, value) if value > low else "does not fit")
        share = _percent(result["costs"][result["chosen"]]["trained"] / result["parameters"])
        self.title.set_text(f"{NAMES[result['chosen']]} learns {share} of the model's numbers")

    @staticmethod
    def describe(state, result):
        method = state["method"]
        mine = result["costs"][method]
        size = f" of {SIZES[method].format(state['size'], 's' * (state['size'] > 1))}" if method in SIZES else ""
        places = "all linear layers" if state["layers"] == "all" else state["layers"]
        where = f" on {places}" if method == "lora" else ""
        # of these methods LoRA is the one that has products of its own and can lose them
        merged = ", and none once it is merged" if method == "lora" else ""
        bits = "4 bits" if state["four_bit"] and method != "full" else "16 bits"
        learns = (
            f"{state['model']} in {bits}, {NAMES[method]}{size}{where}: {mine['trained']:,} trainable parameters, "
            f"{_percent(mine['trained'] / result['parameters'])} of the model"
        )
        if not mine["fits"]:
            return f"{learns}; a row of {state['length']} tokens does not fit into the model's context beside them"
        return (
            f"{learns}{IN_DETAIL}a step over {state['length']} tokens needs {mine['peak'] / GIB:.1f} GiB; "
            f"reading them takes {_percent(mine['work'] - 1)} more operations than the base takes{merged}"
        )


def _prepare(ax: Axes, title: str, limits: tuple, marks: dict, named: bool) -> None:
    ax.set(xscale="log", xlim=limits, ylim=(len(NAMES) - 0.4, -0.6))
    ax.set_xticks(list(marks), list(marks.values()))
    ax.minorticks_off()
    ax.set_yticks(range(len(NAMES)), NAMES.values() if named else [""] * len(NAMES))
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(title, fontsize=SMALLEST)


def _room(field: str) -> float:
    """Factor from a dot to its number, on a logarithmic axis."""
    low, high = PANELS[field][1]
    return (high / low) ** 0.06


def _label(field: str, value: float) -> str:
    if field == "trained":
        unit, name = next((u, n) for u, n in ((1e9, " G"), (1e6, " M"), (1e3, " k"), (1, "")) if value >= u)
        return f"{value / unit:.3g}{name}"
    return f"{value / GIB:.1f}" if field == "peak" else f"{value:.{3 if value < 10 else 1}f}"


def _percent(share: float) -> str:
    # a few parameters of billions: two digits, and never as 6.1e-05
    few = np.format_float_positional(100 * share, precision=2, fractional=False, trim="-")
    return f"{100 * share:,.0f} %" if share >= 0.1 else f"{few} %"
