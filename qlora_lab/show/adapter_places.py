"""The picture of one layer of a LLaMA, and of what each method adds to it.

In: nothing. Out: a Picture. From left to right: the embeddings of tokens, then one layer with its attention part and
its feed-forward part, both beside the residual stream, which runs below them.
"""

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from qlora_lab.show.figure import ACROSS, COLOURS, Picture, new_figure, picture

LINEARS = {"q": (5.1, 6.2), "k": (5.1, 4.7), "v": (5.1, 3.2), "o": (10.0, 4.7)}  # name -> its middle
LINEARS |= {"gate": (15.6, 5.7), "up": (15.6, 3.7), "down": (19.1, 4.7)}
HOULSBY = ((11.45, 4.7), (20.6, 4.7))
# below everything, so that no line crosses a box
STREAM = 1.3  # height of the residual stream
LOW = 0.85  # height of most boxes
METHODS = {  # colour and sign of each, in the key
    "LoRA: two thin matrices beside a weight": ("green", "s"),
    "Houlsby: a bottleneck behind each part": ("orange", "s"),
    "prefix: keys and values before every row": ("purple", "s"),
    "prompt: vectors before the embeddings": ("sky", "s"),
    "biases: added to what a weight gives": ("red", "o"),
}
ALT = (
    "One layer: LoRA stands beside each of the seven weights q, k, v, o, gate, up and down; a Houlsby adapter behind o "
    "and one behind down, each in front of the sum with the residual stream; a prefix before the keys and "
    "values that attention reads; a soft prompt before the embeddings, outside of the layers; biases behind each weight"
)


def adapter_places() -> Picture:
    """Draw the layer. The picture's alt text names each place."""
    fig, ax = new_figure(width=ACROSS, height=4.6)
    ax.set(xlim=(-1.2, 23.2), ylim=(-3.0, 8.1))
    ax.set_axis_off()
    ax.set_title("One layer, and what each method adds to it", fontsize=12)
    frame = {"fill": False, "ls": "--", "lw": 1, "edgecolor": "#767676"}
    ax.add_patch(Rectangle((2.15, 0.5), 20.1, 7.4, **frame))
    ax.text(2.4, 7.3, "one layer", fontsize=10)
    _stream(ax)
    _wires(ax)
    _base(ax)
    for place in LINEARS.values():
        _beside(ax, *place)
    for place in HOULSBY:
        _box(ax, place, "", (0.8, 1.5), COLOURS["orange"])
    _box(ax, (7.3, 2.1), "prefix", (1.8, LOW), edge=COLOURS["purple"])
    for x, y in ((6.9, 3.2), (6.6, 4.7)):  # to the values and to the keys
        _arrow(ax, (x, 2.53), (x, y), COLOURS["purple"])
        ax.plot([x], [y], "o", ms=4, color=COLOURS["purple"], zorder=4)
    _box(ax, (0.5, 3.2), "prompt", (1.9, LOW), edge=COLOURS["sky"])
    _arrow(ax, (0.5, 2.78), (0.5, 1.73))
    # a key instead of names in the picture: LoRA stands at seven places
    _key(ax)
    return picture(fig, ALT)


def _stream(ax: Axes) -> None:
    """The residual stream with its two sums, and the names of the two parts that branch off it."""
    ax.text(0.5, -0.5, "tokens", ha="center", va="center", fontsize=10)
    _arrow(ax, (0.5, -0.15), (0.5, 0.87))
    _box(ax, (0.5, STREAM), "embeddings", (3.0, LOW))
    _arrow(ax, (2.0, STREAM), (23.1, STREAM))
    for back in (12.2, 21.5):
        ax.plot([back], [STREAM], "o", ms=15, color="#ffffff", mec=COLOURS["black"], zorder=5)  # over the arrow
        ax.text(back, STREAM - 0.04, "+", ha="center", va="center", fontsize=12, zorder=6)
    ax.text(8.05, 7.3, "attention", ha="center", fontsize=10)
    ax.text(17.5, 7.3, "feed-forward", ha="center", fontsize=10)


def _wires(ax: Axes) -> None:
    """From the stream through both parts, and back to their sums."""
    corners = [[(2.45, STREAM), (2.45, 4.7), (12.2, 4.7), (12.2, STREAM)]]  # under the sign of the sum
    # up to the branch of gate and up, and on from where they are multiplied
    corners += [[(12.9, STREAM), (12.9, 4.7), (14.7, 4.7)], [(17.5, 4.7), (21.5, 4.7), (21.5, STREAM)]]
    corners += [[(4.1, 4.7), (4.1, y), (7.2, y)] for y in (6.2, 3.2)]  # q and v
    corners += [[(14.7, 4.7), (14.7, y), (17.5, y), (17.5, 4.7)] for y in (5.7, 3.7)]  # gate and up
    for line in corners:
        ax.plot(*zip(*line, strict=True), color=COLOURS["black"], lw=1, zorder=0)


def _base(ax: Axes) -> None:
    """The frozen weights and what lies between them."""
    _box(ax, (3.25, 4.7), "norm", (1.3, LOW))
    _box(ax, (13.75, 4.7), "norm", (1.3, LOW))
    _box(ax, (8.05, 4.85), "softmax\n(q kᵀ) v", (1.75, 3.7))
    _box(ax, (17.5, 5.7), "silu", (1.1, LOW))
    _box(ax, (17.5, 4.7), "×", (0.7, LOW))
    for name, place in LINEARS.items():
        _box(ax, place, name, (1.6, LOW), "#e5e5e5")


def _beside(ax: Axes, x: float, y: float) -> None:
    """What LoRA and a bias add to the weight at this place."""
    for shift in (-0.38, 0.38):  # A and B
        ax.add_patch(Rectangle((x + shift - 0.3, y - 0.83), 0.6, 0.36, color=COLOURS["green"], lw=0))
    ax.plot([x + 0.82], [y], "o", ms=8, zorder=3, color=COLOURS["red"], mec="#ffffff")


def _box(ax: Axes, place: tuple, text: str, size: tuple, fill: str = "#ffffff", edge: str | None = None) -> None:
    """edge: colour of a thick frame, where the text would be hard to read on that colour; else a thin one in black."""
    (x, y), (width, height) = place, size
    frame = {"edgecolor": edge or COLOURS["black"], "lw": 3 if edge else 1}
    ax.add_patch(Rectangle((x - width / 2, y - height / 2), width, height, facecolor=fill, **frame))
    ax.text(x, y, text, ha="center", va="center", fontsize=10)


def _arrow(ax: Axes, start: tuple, end: tuple, colour: str = COLOURS["black"]) -> None:
    style = {"arrowstyle": "->", "color": colour, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", end, start, arrowprops=style, zorder=4)


def _key(ax: Axes) -> None:
    for i, (words, (colour, mark)) in enumerate(METHODS.items()):
        x, y = 2.5 + 10.6 * (i % 2), -0.6 - 0.85 * (i // 2)
        ax.plot([x], [y], mark, ms=9, color=COLOURS[colour], clip_on=False)
        ax.text(x + 0.45, y, words, va="center", fontsize=10)
