"""toy-shapes: the same for a seed, balanced, and with combinations that only the test has."""

import json
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
from PIL import Image

from qlora_lab.data.shapes import (
    COLOURS,
    NUMBERS,
    SHAPES,
    SIZE,
    WORDS,
    Scene,
    cells,
    draw,
    frequent_answers,
    is_held_out,
    questions,
    shapes_split,
    write_shapes,
)

SPLIT = shapes_split(1440, 144)
SCENE = Scene("blue", "ring", "two", "left", 5)


def pairs(scenes, *names):
    return {tuple(getattr(scene, name) for name in names) for scene in scenes}


def test_no_combination_of_the_test_is_ever_learned():
    trained, tested = (pairs(scenes, "colour", "shape", "number") for scenes in (SPLIT.train, SPLIT.test))
    assert len(trained) == 72 and len(tested) == 36 and trained.isdisjoint(tested)


@pytest.mark.parametrize("names", list(combinations(WORDS, 2)))
def test_every_pair_is_learned_and_tested_equally_often(names):
    every = dict.fromkeys(product(*(WORDS[name] for name in names)))
    for scenes in (SPLIT.train, SPLIT.test):
        counts = Counter(tuple(getattr(scene, name) for name in names) for scene in scenes)
        assert counts.keys() == every.keys() and len(set(counts.values())) == 1


@pytest.mark.parametrize("scenes", [SPLIT.train, SPLIT.test], ids=["train", "test"])
@pytest.mark.parametrize("name", WORDS)
def test_every_word_occurs_equally_often(scenes, name):
    counts = Counter(getattr(scene, name) for scene in scenes)
    assert counts == dict.fromkeys(WORDS[name], len(scenes) // len(WORDS[name]))


def test_who_looks_at_no_picture_is_right_as_often_as_chance():
    expected = {name: 1 / len(words) for name, words in WORDS.items()}
    assert frequent_answers(SPLIT.train, SPLIT.test) == pytest.approx(expected)


def test_a_seed_decides_everything():
    assert shapes_split(50, 10, seed=3) == shapes_split(50, 10, seed=3)
    assert shapes_split(50, 10, seed=3) != shapes_split(50, 10, seed=4)
    assert np.array_equal(draw(SCENE), draw(SCENE))
    assert not np.array_equal(draw(SCENE), draw(SCENE._replace(dice=6)))


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_lie_in_their_cells_and_have_their_colour(colour, shape):
    for number in NUMBERS:
        scene = Scene(colour, shape, number, "bottom", 1)
        pixels = draw(scene).astype(int)
        # a grey background differs between channels by its noise alone, and the colours by more than 100
        coloured = np.ptp(pixels, axis=2) > 75
        rows, columns = np.nonzero(coloured)
        assert rows.min() >= 31  # a shape may reach one pixel into the cell above
        assert len(cells(scene)) == NUMBERS.index(number) + 1
        assert {(2, c) for c in (columns // 16)} >= set(cells(scene)), (colour, shape, number)
        mean = pixels[coloured].mean(0)  # with edges, which mix with the background
        assert min(COLOURS, key=lambda name: np.abs(mean - COLOURS[name]).sum()) == colour


def test_all_shapes_look_different():
    drawn = {shape: draw(SCENE._replace(shape=shape)).astype(int) for shape in SHAPES}
    for one in SHAPES:
        for other in SHAPES:
            differ = (np.abs(drawn[one] - drawn[other]).max(2) > 60).sum()
            assert (differ > 20) == (one != other), (one, other, differ)


def test_one_shape_alone_is_on_one_side_only():
    assert [cells(SCENE._replace(number="one", side=side)) for side in WORDS["side"]] == [
        [(0, 1)],
        [(2, 1)],
        [(1, 0)],
        [(1, 2)],
    ]


def test_questions_are_answered_by_the_scene():
    assert {name: answer for name, (_, answer) in questions(SCENE).items()} == {
        "colour": "blue",
        "shape": "ring",
        "number": "two",
        "side": "left",
    }


def test_what_is_held_out():
    assert is_held_out(Scene("red", "circle", "one", "top"))  # the first of each: 0 + 0 + 0
    assert not is_held_out(Scene("red", "circle", "two", "top"))
    assert is_held_out(Scene("red", "square", "three", "top"))  # 0 + 1 + 2


def test_a_record_asks_all_questions_about_a_picture(tmp_path):
    scenes = SPLIT.train[:48]
    file = write_shapes(tmp_path / "set", scenes)
    records = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    first = Counter()
    for record, scene in zip(records, scenes, strict=True):
        texts = [message["content"] for message in record["messages"]]
        assert [message["role"] for message in record["messages"]] == ["user", "assistant"] * 4
        assert texts[0].startswith("<image>\n")
        asked = dict(zip([texts[0].removeprefix("<image>\n"), *texts[2::2]], texts[1::2], strict=True))
        assert asked == dict(questions(scene).values())
        assert np.array_equal(np.asarray(Image.open(file.parent / record["image"])), draw(scene))
        first[texts[0]] += 1
    assert len(first) == 4  # each question comes first for some picture: an answer must not need the one before it


def test_blank_pictures_show_nothing(tmp_path):
    file = write_shapes(tmp_path / "set", SPLIT.train[:2], blank=True)
    pictures = [np.asarray(Image.open(path)) for path in sorted(file.parent.glob("*.png"))]
    assert len(pictures) == 2 and {(p.shape, p.min(), p.max()) for p in pictures} == {((SIZE, SIZE, 3), 127, 127)}


@pytest.mark.parametrize(("name", "word"), [("colour", "pink"), ("shape", "heart"), ("number", 2), ("side", "middle")])
def test_an_unknown_word_is_named(name, word):
    with pytest.raises(ValueError, match=f"{name}={word!r} is not known: choose from "):
        draw(SCENE._replace(**{name: word}))


@pytest.mark.parametrize("options", [{"train": 0}, {"test": 0}, {"seed": -1}])
def test_an_impossible_split_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        shapes_split(**options)
