"""toy-shapes: small pictures of coloured shapes with four questions each, to see whether a model sees.

In: a seed. Out: Scenes; `draw` makes a picture of one, (48, 48, 3) uint8 RGB; `questions` asks for its colour, shape,
number and side, each with an answer of one word. It is drawn here and compares with no benchmark: a model that is
perfect on it has learned to read four properties of a toy.

A picture holds one to three equal shapes along one of its sides. No combination of colour, shape and number in the test
ever occurs in training, so a model that only remembers whole pictures does not know the test's. Each word, and each
pair of words, occurs in training equally often (but for a remainder), so neither a frequent word nor one property gives
away another. Two of the three together do, and they mislead: they exclude the value that a picture of the test has.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qlora_lab.data.pictures import PLACEHOLDER
from qlora_lab.files import disk
from qlora_lab.files.out_path import out_path
from qlora_lab.files.replace import replacing_folder
from qlora_lab.quant.numbers import check_seed, check_whole

NAME = "toy-shapes"
SIZE = 48  # pixels
CELL = 16  # pixels: the picture is a grid of three by three
COLOURS = {  # far enough apart that noise makes none into another
    "red": (214, 40, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (235, 205, 30),
    "purple": (140, 50, 170),
    "orange": (245, 130, 20),
}
SHAPES = ("circle", "square", "star", "cross", "ring", "line")
NUMBERS = ("one", "two", "three")
SIDES = {  # its three cells, as (row, column)
    "top": ((0, 0), (0, 1), (0, 2)),
    "bottom": ((2, 0), (2, 1), (2, 2)),
    "left": ((0, 0), (1, 0), (2, 0)),
    "right": ((0, 2), (1, 2), (2, 2)),
}
ASKED = {"colour": "Which colour?", "shape": "Which shape?", "number": "How many?", "side": "Which side?"}
WORDS = {"colour": tuple(COLOURS), "shape": SHAPES, "number": NUMBERS, "side": tuple(SIDES)}
FINER = 4  # samples a pixel in each direction, or edges would be stairs
RECORDS = "questions.jsonl"
NOISE = 8  # of 255, standard deviation

BLANK = np.full((SIZE, SIZE, 3), 127, np.uint8)  # a picture of nothing


class Scene(NamedTuple):
    """What a picture shows, and `dice`, the seed of all that no question asks: places, sizes, shades, noise."""

    colour: str
    shape: str
    number: str
    side: str
    dice: int = 0


@dataclass(frozen=True)
class Split:
    """Scenes to learn from and scenes to be tested on."""

    train: tuple[Scene, ...]
    test: tuple[Scene, ...]


def is_held_out(scene: Scene) -> bool:
    """Tell whether training never shows this colour, shape and number together: one number of three for each pair."""
    places = (WORDS[name].index(getattr(scene, name)) for name in ("colour", "shape", "number"))
    return sum(places) % len(NUMBERS) == 0


def shapes_split(train: int = 1920, test: int = 144, *, seed: int = 0) -> Split:
    """Draw scenes: `train` of them from the combinations of training, `test` of them from those held out.

    Each kind of scene occurs equally often, but for a remainder that the seed draws. Raises ValueError for a number
    below one.
    """
    check_whole("train", train)
    check_whole("test", test)
    check_seed(seed)
    rng = np.random.default_rng([seed, 7])  # 7: another stream than that of a picture with these dice
    kinds = [Scene(*words) for words in product(*WORDS.values())]
    seen = [scene for scene in kinds if not is_held_out(scene)]
    unseen = [scene for scene in kinds if is_held_out(scene)]
    return Split(_drawn(seen, train, rng), _drawn(unseen, test, rng))


def _drawn(kinds: Sequence[Scene], number: int, rng: np.random.Generator) -> tuple[Scene, ...]:
    """Go through all kinds again and again, each time in a new order."""
    rounds = -(-number // len(kinds))
    order = np.concatenate([rng.permutation(len(kinds)) for _ in range(rounds)])[:number]
    dice = rng.integers(2**31, size=number)
    return tuple(kinds[i]._replace(dice=int(d)) for i, d in zip(order, dice, strict=True))


def questions(scene: Scene) -> dict[str, tuple[str, str]]:
    """Return property -> (question, answer).

    >>> questions(Scene("red", "ring", "two", "left"))["number"]
    ('How many?', 'two')
    """
    return {name: (ASKED[name], getattr(scene, name)) for name in ASKED}


def draw(scene: Scene) -> np.ndarray:
    """Draw the picture, (48, 48, 3) uint8. The same scene gives the same bytes. ValueError for an unknown word."""
    for name, words in WORDS.items():
        if getattr(scene, name) not in words:
            raise ValueError(f"{name}={getattr(scene, name)!r:.40} is not known: choose from {', '.join(words)}")
    dice = np.random.default_rng(scene.dice)
    background = dice.uniform(150, 245)
    tint = np.array(COLOURS[scene.colour]) + dice.uniform(-18, 18, 3)
    covered = np.zeros((SIZE * FINER, SIZE * FINER), bool)
    for row, column in cells(scene):
        # Off the middle of its cell, so that a shape may cross the edge of a patch of the model's.
        y, x = (np.array([row, column]) + 0.5) * CELL + dice.uniform(-1, 1, 2)
        _fill(covered, scene.shape, x, y, dice.uniform(5.8, 7))
    share = covered.reshape(SIZE, FINER, SIZE, FINER).mean((1, 3))[..., None]  # (48, 48, 1), of each pixel
    pixels = background + share * (tint - background) + dice.normal(0, NOISE, (SIZE, SIZE, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def cells(scene: Scene) -> list[tuple[int, int]]:
    """Return (row, column) of the cells that hold a shape. One alone is in the middle: a corner is on two sides."""
    side = SIDES[scene.side]
    number = NUMBERS.index(scene.number) + 1
    dice = np.random.default_rng([scene.dice, 1])
    places = [1] if number == 1 else sorted(dice.permutation(3)[:number])
    return [side[place] for place in places]


def _fill(covered: np.ndarray, shape: str, x: float, y: float, radius: float) -> None:
    """Mark the samples that lie in a shape around (x, y), in pixels. Looks only at the samples near it."""
    top, left = (max(int((middle - radius - 1) * FINER), 0) for middle in (y, x))
    bottom, right = (int((middle + radius + 1) * FINER) for middle in (y, x))
    window = covered[top:bottom, left:right]
    high, wide = ((np.arange(n) + start + 0.5) / FINER for n, start in zip(window.shape, (top, left), strict=True))
    window |= _inside(shape, (wide[None] - x) / radius, (high[:, None] - y) / radius)


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Tell which points lie in a shape of radius 1 around 0; y points down."""
    wide, high = np.abs(x), np.abs(y)
    if shape == "square":
        return np.maximum(wide, high) <= 0.82
    if shape == "cross":
        return (np.minimum(wide, high) <= 0.28) & (np.maximum(wide, high) <= 1)
    if shape == "line":
        return (high <= 0.28) & (wide <= 1)
    distance = np.hypot(x, y)
    if shape == "star":
        turn = (np.arctan2(x, -y) / (2 * np.pi) * 5) % 1  # from one of five tips to the next
        return distance <= 0.42 + 0.58 * np.abs(2 * turn - 1)
    return (distance <= 1) & (distance >= (0.55 if shape == "ring" else 0))


def write_shapes(folder: str | Path, scenes: Sequence[Scene], *, blank: bool = False) -> Path:
    """Write pictures and a file of records for `load_data`; returns the file.

    A record is a conversation about one picture, as LLaVA's data has them: four questions and answers, in an order that
    the dice of its scene decide. blank: every picture is plain grey, so only words are left to learn from.
    """
    from PIL import Image

    lines = []
    folder = out_path(folder)
    with replacing_folder(folder) as new:
        for number, scene in enumerate(scenes):
            name = f"{number:05d}.png"
            Image.fromarray(BLANK if blank else draw(scene)).save(new / name)
            order = np.random.default_rng([scene.dice, 2]).permutation(len(ASKED))
            pairs = [list(questions(scene).values())[place] for place in order]
            turns = [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]
            messages = [{"role": role, "content": text} for role, text in turns]
            messages[0]["content"] = f"{PLACEHOLDER}\n{messages[0]['content']}"
            lines.append(json.dumps({"image": name, "messages": messages}))
        disk.write_text(new / RECORDS, "\n".join(lines) + "\n")
    return folder / RECORDS


def frequent_answers(train: Iterable[Scene], test: Sequence[Scene]) -> dict[str, float]:
    """Return property -> accuracy on `test` of the best answer that looks at no picture: the most frequent one."""
    train = list(train)
    share = {}
    for name in ASKED:
        answer, _ = Counter(getattr(scene, name) for scene in train).most_common(1)[0]
        share[name] = sum(getattr(scene, name) == answer for scene in test) / len(test)
    return share
