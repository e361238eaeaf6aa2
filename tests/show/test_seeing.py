"""The seeing explorer shows what a tower reads, as it is and rounded; here one that has hardly learned."""

import numpy as np
import pytest

from qlora_lab.data.shapes import SHAPES, WORDS, Scene, draw
from qlora_lab.show.seeing import STORED, SeeingExplorer
from qlora_lab.train.toy_llava import EMPTY, trained_tower

TOWER = trained_tower([Scene("red", "ring", "two", "left")], 1, progress=False)
STATE = {"colour": "blue", "shape": "cross", "number": "two", "side": "top", "asked": "colour", "read_by": "nf2"}
EXPLORER = SeeingExplorer(TOWER, **STATE)


@pytest.mark.long
@pytest.mark.parametrize("asked", WORDS)
@pytest.mark.parametrize("read_by", STORED)
def test_any_state(asked, read_by):
    EXPLORER.set(asked=asked, read_by=read_by)
    scene = Scene(*(STATE[name] for name in WORDS))
    assert np.array_equal(EXPLORER.image.get_array(), draw(scene))
    kinds = EXPLORER.towers[read_by].read([scene])[0][0].tolist()
    names = [label.get_text() for label in EXPLORER.labels]
    assert names == ["" if kind == EMPTY else SHAPES[kind] for kind in kinds]
    for name, tower in EXPLORER.towers.items():
        heights = [line[1][1] for line in EXPLORER.bars[name].get_segments()]
        assert heights == pytest.approx((100 * tower.read([scene])[1][asked][0]).tolist(), rel=1e-5)
    assert [text.get_text() for text in EXPLORER.words if text.get_text()] == list(WORDS[asked])


@pytest.mark.long
def test_the_sentence():
    EXPLORER.set(**STATE)
    start = "Two blue crosses at the top, a combination that training never showed. In detail: asked for the colour, "
    start += "the tower answers: "
    shares = {name: tower.read([Scene("blue", "cross", "two", "top")])[1] for name, tower in EXPLORER.towers.items()}
    best = {name: share["colour"][0].max(0) for name, share in shares.items()}
    answers = [f"{STORED[n]}, {WORDS['colour'][b.indices]} ({100 * b.values:.0f} %)" for n, b in best.items()]
    assert EXPLORER.summary().startswith(f"{start}{'; '.join(answers)}; the tower in NF2 reads ")
    EXPLORER.set(shape="ring", number="one", side="left", asked="side")
    assert EXPLORER.summary().startswith(
        "One blue ring on the left, a combination that training never showed. In detail: asked for the side"
    )
    EXPLORER.set(number="two", side="top")
    EXPLORER.set(colour="red", shape="circle")
    assert EXPLORER.summary().startswith("Two red circles at the top, a combination that training showed")
    assert EXPLORER.code().startswith("SeeingExplorer(tower, colour='red', shape='circle', ")


@pytest.mark.long
def test_a_picture_does_not_depend_on_the_one_before_it():
    EXPLORER.set(**{**STATE, "shape": "line", "asked": "shape"})
    EXPLORER.set(**STATE)
    assert SeeingExplorer(TOWER, **STATE).png == EXPLORER.png
