"""The memory explorer: every byte of a training step, for full fine-tuning, LoRA and QLoRA, beside the cards on sale.

State: model, codebook, block_size, double_quant, r, length, rows, gradient_checkpointing, optimizer. The picture: on
top a bar for each method with the groups of the ledger at the peak of a step, and lines where a card ends; a bar that
leaves the picture has its number at the edge. Below it the bar of QLoRA alone, stretched to 100 %.

Cards are counted in GiB, which their makers call GB.
"""

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.text import Text

from qlora_lab.memory.ledger import Ledger
from qlora_lab.memory.predict import predict_memory
from qlora_lab.memory.shape import PUBLISHED, shape_of
from qlora_lab.optim.paging import PAGE_SIZE
from qlora_lab.show.explorer import Explorer, fix_layout
from qlora_lab.show.figure import BESIDE, COLOURS, IN_DETAIL, SMALLEST, TITLE, new_figure
from qlora_lab.show.slider import Slider, Toggle

GIB = 2**30
CARDS = (8, 16, 24, 48, 80)  # GiB
WIDEST = 96  # GiB: the largest card, and room for a number beside it
METHODS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
GROUPS = {  # of the ledger, in its order, with their colours
    "weights": COLOURS["sky"],
    "adapters": COLOURS["green"],
    "gradients": COLOURS["yellow"],
    "optimizer": COLOURS["blue"],
    "activations": COLOURS["orange"],
    "loss": COLOURS["red"],
    "workspace": COLOURS["purple"],
    "runtime": "#999999",
}
EDGE = "#666666"  # yellow is faint on white, and in a dark theme
OPTIMIZERS = {  # "paged" means fully: one page in memory
    "AdamW": {},
    "8-bit AdamW": {"optimizer_bits": 8},
    "paged AdamW": {"optimizer_budget": PAGE_SIZE},
    "paged 8-bit AdamW": {"optimizer_bits": 8, "optimizer_budget": PAGE_SIZE},
}
LEAST_LABELLED = 0.07  # share of the stretched bar that a percentage needs
Rectangle = list[tuple[float, float]]  # four corners


def at_peak(ledger: Ledger, phase: str | None = None) -> dict[str, int]:
    """Sum the predicted bytes of each group in a phase, by default the peak's; zeros included."""
    return dict.fromkeys(GROUPS, 0) | ledger.groups_at(phase or ledger.phase)


def card_for(nbytes: int) -> int | None:
    """Return the GiB of the smallest card with at least this many bytes, None if there is none."""
    return next((card for card in CARDS if nbytes <= card * GIB), None)


def rectangles(bars: list[dict[str, float]], height: float = 0.62) -> list[Rectangle]:
    """Outline stacked horizontal bars, bar after bar: a rectangle for each of GROUPS, empty ones too."""
    outlines = []
    for y, sizes in enumerate(bars):
        low, high = y - height / 2, y + height / 2
        left = 0.0
        for group in GROUPS:
            right = left + sizes[group]
            outlines.append([(left, low), (right, low), (right, high), (left, high)])
            left = right  # the next group starts here
    return outlines


def stacked(ax: Axes, names: list[str]) -> PolyCollection:
    """Prepare an axis of horizontal bars with these names, from above; set_verts gives the outlines later."""
    ax.set(ylim=(len(names) - 0.5, -0.5))
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", length=0)
    colours = list(GROUPS.values()) * len(names)  # rectangles come bar by bar
    return ax.add_collection(PolyCollection([], facecolors=colours, edgecolors=EDGE, lw=0.5))


def key(ax: Axes, columns: int = 4, size: float = 10) -> list[Text]:
    """Make an axis the key of the colours: squares, and beside each a text to fill in, of `size` points."""
    places = [(i % columns, i // columns) for i in range(len(GROUPS))]
    ax.set(xlim=(0, columns), ylim=((len(GROUPS) - 1) // columns + 0.6, -0.6))
    ax.set_axis_off()
    squares = {"s": 9 * size, "marker": "s", "c": list(GROUPS.values()), "edgecolors": EDGE, "lw": 0.5}
    ax.scatter(*zip(*places, strict=True), clip_on=False, **squares)
    return [ax.text(x + 0.07, y, "", va="center", fontsize=size) for x, y in places]


class MemoryExplorer(Explorer):
    """Model, data type, adapter, rows and optimizer: where every byte of a step goes. See Explorer."""

    def controls(self):
        return {
            "model": Slider("Model", "llama-7b", choices=sorted(PUBLISHED, key=lambda name: shape_of(name).parameters)),
            "codebook": Slider("Codebook", "nf4", choices=["nf2", "nf3", "nf4"]),
            "block_size": Slider("Block size", 64, choices=[16, 32, 64, 128, 256, 512], unit="weights"),
            "double_quant": Toggle("Double quantization", True),
            "r": Slider("r", 64, choices=[1, 2, 4, 8, 16, 32, 64, 128, 256]),
            "length": Slider("Sequence length", 512, choices=[2**i for i in range(7, 17)], unit="tokens"),
            "rows": Slider("Rows at once", 1, choices=[1, 2, 4, 8, 16]),
            "gradient_checkpointing": Toggle("Gradient checkpointing", True),
            "optimizer": Slider("Optimizer", "AdamW", choices=list(OPTIMIZERS)),
        }

    @staticmethod
    def compute(state):
        setup = {name: value for name, value in state.items() if name not in ("model", "rows", "optimizer")}  # Setup's
        setup |= {"batch_size": state["rows"], **OPTIMIZERS[state["optimizer"]]}
        ledgers = {method: predict_memory(state["model"], method, **setup) for method in METHODS}
        return {
            "groups": {method: at_peak(ledger) for method, ledger in ledgers.items()},  # bytes
            "peak": {method: ledger.peak for method, ledger in ledgers.items()},  # bytes
            "phase": {method: ledger.phase for method, ledger in ledgers.items()},
            "card": {method: card_for(ledger.peak) for method, ledger in ledgers.items()},  # GiB, or None
        }

    def draw(self):
        fig, (upper, lower, names) = new_figure(rows=3, width=BESIDE, height=4.4, heights=[2.6, 0.7, 1])
        for axis in (upper, lower):
            axis.spines["left"].set_visible(False)
        upper.set(xlim=(0, WIDEST), xlabel="GiB at the peak of a step; dashed: cards on sale")
        upper.set_xticks([0, *CARDS], ["0", *map(str, CARDS)])
        self.bars = stacked(upper, list(METHODS.values()))
        self.strip = stacked(lower, ["QLoRA"])
        # room above the strip: its numbers stand on white, where no colour takes their contrast in a dark theme
        lower.set(xlim=(0, 100), ylim=(0.4, -0.9), xlabel="% of QLoRA's peak")
        ends = [[(card, -0.5), (card, len(METHODS) - 0.5)] for card in CARDS]
        cards = upper.add_collection(LineCollection(ends, colors=COLOURS["black"], lw=1, ls="--"))
        box = {"facecolor": "#ffffff", "edgecolor": "none", "pad": 1.5}
        self.peaks = [upper.text(0, y, "", va="center", bbox=box) for y in range(len(METHODS))]
        self.shares = [lower.text(0, -0.38, "", ha="center", va="bottom") for _ in GROUPS]
        self.title = upper.set_title("QLoRA", loc="left", fontsize=TITLE)
        self.names = key(names, 3, SMALLEST)
        fix_layout(fig)
        return fig, [self.bars, cards, *self.peaks, self.strip, *self.shares, *self.names, self.title]

    def update(self, result):
        sizes = {method: {g: n / GIB for g, n in groups.items()} for method, groups in result["groups"].items()}
        self.bars.set_verts(rectangles(list(sizes.values())))
        for text, nbytes in zip(self.peaks, result["peak"].values(), strict=True):
            short = nbytes < 0.88 * WIDEST * GIB  # the number fits beside the bar
            text.set_x(nbytes / GIB + 0.8 if short else WIDEST)
            text.set_ha("left" if short else "right")
            text.set_text(f"{_gib(nbytes)}{'' if nbytes < WIDEST * GIB else ' →'}")
        mine = result["groups"]["qlora"]
        peak = result["peak"]["qlora"]
        outlines = rectangles([{group: 100 * n / peak for group, n in mine.items()}])  # in %
        self.strip.set_verts(outlines)
        for text, outline, n in zip(self.shares, outlines, mine.values(), strict=True):
            text.set_x((outline[0][0] + outline[1][0]) / 2)  # the middle
            text.set_text(f"{100 * n / peak:.0f} %" if n >= LEAST_LABELLED * peak else "")
        for text, (group, n) in zip(self.names, mine.items(), strict=True):
            text.set_text(f"{group} {_gib(n)}")
        fits = _fits(result["card"]["qlora"], "over")
        self.title.set_text(f"QLoRA: {_gib(peak)} {_when(result['phase']['qlora'])}, {fits}")

    @staticmethod
    def describe(state, result):
        double = " + double quantization" if state["double_quant"] else ""
        again = ", gradient checkpointing" if state["gradient_checkpointing"] else ""
        parts = ", ".join(f"{group} {_gib(n)}" for group, n in result["groups"]["qlora"].items())
        peaks = {method: f"{_gib(result['peak'][method])}, {_fits(result['card'][method])}" for method in METHODS}
        return (
            f"QLoRA needs {peaks['qlora']}; LoRA {peaks['lora']}; full fine-tuning {peaks['full']}{IN_DETAIL}"
            f"{state['model']}, {state['codebook']}/{state['block_size']}{double}, r={state['r']}, "
            f"{state['rows']} x {state['length']} tokens at once{again}, {state['optimizer']}: QLoRA's peak is "
            f"{_when(result['phase']['qlora'])}: {parts}"
        )


def _gib(nbytes: int) -> str:
    size, unit = (nbytes / GIB, "GiB") if nbytes < 1000 * GIB else (nbytes / GIB / 1024, "TiB")
    return f"{size:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f} {unit}"  # three digits


def _fits(card: int | None, if_not: str = "too large for") -> str:
    return f"fits on {card} GB" if card else f"{if_not} {CARDS[-1]} GB"


def _when(phase: str) -> str:
    places = {"loss": "at the loss", "backward": "as the backward pass begins", "end": "as the backward pass ends"}
    return places.get(phase, "in the update")
