"""The seeing explorer: a picture of toy-shapes, what each patch of the tower takes it for, and how sure the tower is.

State: colour, shape, number, side, asked, read_by. The picture: on the left what the tower reads, in its nine patches,
with the shape that each seems to hold; on the right how probable it finds each word that could answer, stored in 32
bits and with its layers in NF4, NF3 and NF2.

All four towers compute anew for each state: a picture takes them a few milliseconds.
"""

import numpy as np
from matplotlib.collections import LineCollection

from qlora_lab.data.shapes import CELL, SHAPES, SIZE, WORDS, Scene, draw, is_held_out
from qlora_lab.show.explorer import Explorer, fix_layout
from qlora_lab.show.figure import BESIDE, CLOSE, COLOURS, IN_DETAIL, SMALLEST, TITLE, bars, new_figure
from qlora_lab.show.slider import Slider
from qlora_lab.train.toy_llava import EMPTY, PATCHES, ToyTower, rounded

STORED = {"float32": "as trained", "nf4": "in NF4", "nf3": "in NF3", "nf2": "in NF2"}
INKS = dict(zip(STORED, ("black", "blue", "green", "orange"), strict=True))
MOST = max(map(len, WORDS.values()))  # words of a question
GAP = 0.19  # between the bars of a word
PLURAL = {"cross": "crosses"}


class SeeingExplorer(Explorer):
    """A picture, its patches, and the answers of a tower in four precisions. See Explorer.

    SeeingExplorer(tower, colour="red"): tower comes from train.toy_llava.trained_tower.
    """

    def __init__(self, tower: ToyTower, **state):
        # Made once: rounding takes longer than a slider may.
        self.towers = {name: tower if name == "float32" else rounded(tower, name) for name in STORED}
        super().__init__(**state)

    def controls(self):
        words = {name: Slider(name.capitalize(), choice[0], choices=list(choice)) for name, choice in WORDS.items()}
        return words | {
            "asked": Slider("Question", "shape", choices=list(WORDS)),
            "read_by": Slider("Patches read by", "float32", choices=list(STORED)),
        }

    def compute(self, state):
        scene = Scene(*(state[name] for name in WORDS))
        read = {name: tower.read([scene]) for name, tower in self.towers.items()}
        return {
            "pixels": draw(scene),  # (48, 48, 3)
            "read_by": STORED[state["read_by"]],
            "patches": read[state["read_by"]][0][0].tolist(),  # of nine patches: a place in SHAPES, or EMPTY
            "words": WORDS[state["asked"]],
            "shares": {name: shares[state["asked"]][0].tolist() for name, (_, shares) in read.items()},
            "held_out": is_held_out(scene),
        }

    def draw(self):
        fig, (left, right) = new_figure(2, width=BESIDE, height=3.1)
        left.get_gridspec().set_width_ratios([1, 1.75])
        self.image = left.imshow(np.zeros((SIZE, SIZE, 3), np.uint8), interpolation="nearest")
        left.set(xticks=[], yticks=[], xlabel=" ")  # keeps room for the text that moves
        self.reader = left.text(0.5, -0.03, "", transform=left.transAxes, ha="center", va="top")
        edges = np.arange(CELL, SIZE, CELL) - 0.5  # a pixel's middle has the whole number
        lines = [[(e, -0.5), (e, SIZE - 0.5)] for e in edges] + [[(-0.5, e), (SIZE - 0.5, e)] for e in edges]
        grid = left.add_collection(LineCollection(lines, colors="white", lw=1))
        middles = [(np.array(divmod(patch, SIZE // CELL)[::-1]) + 0.5) * CELL for patch in range(PATCHES)]
        box = {"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1}
        self.labels = [left.text(x, y, "", ha="center", va="center", fontsize=SMALLEST, bbox=box) for x, y in middles]
        right.set(xlim=(-0.6, MOST - 0.4), ylim=(0, 100), xticks=[], ylabel="probability, %")
        self.bars = {}
        for name, label in STORED.items():
            style = {"colors": COLOURS[INKS[name]], "lw": 5, "capstyle": "butt", "label": label}
            self.bars[name] = right.add_collection(LineCollection([], **style))
        self.words = [
            right.text(i, -4, "", ha="center", va="top", fontsize=SMALLEST, clip_on=False) for i in range(MOST)
        ]
        fig.legend(*right.get_legend_handles_labels(), loc="outside upper right", ncols=4, frameon=False, **CLOSE)
        right.set_xlabel(" ", fontsize=14)  # keeps room for the words
        self.title = left.set_title("picture", loc="left", fontsize=TITLE)
        fix_layout(fig)
        return fig, [self.image, self.reader, grid, *self.labels, *self.bars.values(), *self.words, self.title]

    def update(self, result):
        self.image.set_data(result["pixels"])
        self.reader.set_text(f"patches, read {result['read_by']}")
        answers = {result["words"][int(np.argmax(shares))] for shares in result["shares"].values()}
        agree = f"All four towers say {min(answers)}" if len(answers) == 1 else "The towers disagree"
        self.title.set_text(agree)
        for label, held in zip(self.labels, result["patches"], strict=True):
            label.set_text("" if held == EMPTY else SHAPES[held])
            label.set_visible(held != EMPTY)  # an empty text would leave its box
        for place, (name, shares) in enumerate(result["shares"].items()):
            shift = (place - 1.5) * GAP
            self.bars[name].set_segments(bars(np.arange(len(shares)) + shift, 100 * np.array(shares)))
        for text, word in zip(self.words, (*result["words"], *[""] * (MOST - len(result["words"]))), strict=True):
            text.set_text(word)

    @staticmethod
    def describe(state, result):
        read = [SHAPES[held] for held in result["patches"] if held != EMPTY]
        patches = f"{len(read)} patch{'es' if len(read) > 1 else ''} as {', '.join(read)}" if read else "no shape"
        answers = []
        for name, shares in result["shares"].items():
            best = int(np.argmax(shares))
            answers.append(f"{STORED[name]}, {result['words'][best]} ({100 * shares[best]:.0f} %)")
        seen = (
            "a combination that training never showed" if result["held_out"] else "a combination that training showed"
        )
        return (
            f"{counted(state)}, {seen}{IN_DETAIL}asked for the {state['asked']}, the tower answers: "
            f"{'; '.join(answers)}; the tower {STORED[state['read_by']]} reads {patches}"
        )

    def code(self):
        return super().code().replace("(", "(tower, ", 1)


def counted(scene: dict[str, str]) -> str:
    """Say what a picture shows.

    >>> counted({"colour": "red", "shape": "cross", "number": "two", "side": "left"})
    'Two red crosses on the left'
    """
    shape = scene["shape"]
    shapes = shape if scene["number"] == "one" else PLURAL.get(shape, f"{shape}s")
    where = "at the" if scene["side"] in ("top", "bottom") else "on the"
    return f"{scene['number'].capitalize()} {scene['colour']} {shapes} {where} {scene['side']}"
