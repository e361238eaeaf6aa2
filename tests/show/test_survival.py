"""The survival explorer shows the reports that it is given, layer by layer."""

import numpy as np
import pytest

from qlora_lab.export.parity import Change, Parity
from qlora_lab.export.survival import Survival
from qlora_lab.show.survival import SurvivalExplorer

LAYERS = [f"model.layers.{i}.{part}_proj" for i in range(3) for part in ("self_attn.q", "mlp.up")]


def report(kl, adapter_kl, cosines, moved):
    changes = {layer: Change(c, m) for layer, c, m in zip(LAYERS, cosines, moved, strict=True)}
    return Parity("requantised", kl, adapter_kl, 0.9, 18.0, 19.0, 192, 0.05, changes)


SURVIVED = Survival(
    dict(zip(LAYERS, (0.01, 0.01, 0.01, 0.01, 0.02, 0.03), strict=True)),  # 1.5 % on average
    {
        1: report(0.11, 0.1, [0.0] * 5 + [None], [0.0] * 6),  # the last layer's adapter changed nothing
        4: report(1.2, 0.8, [0.1, 0.2, 0.1, 0.2, 0.1, 0.5], [0.01, 0.02, 0.01, 0.02, 0.01, 0.05]),
        16: report(1.0, 10.0, [0.9] * 6, [0.4] * 6),
    },
)
EXPLORER = SurvivalExplorer(SURVIVED)


@pytest.mark.parametrize("factor", [1, 4, 16])
@pytest.mark.parametrize(("shown", "field"), [("cosine", "cosine"), ("codes moved", "nibbles_changed")])
def test_any_state(factor, shown, field):
    EXPLORER.set(factor=factor, shown=shown)
    made = SURVIVED.reports[factor]
    drawn = np.asarray(EXPLORER.image.get_array()).T.ravel()  # a column for each block, q above up
    assert drawn.tolist() == [getattr(change, field) or 0.0 for change in made.layers.values()]
    assert EXPLORER.name.get_text() == shown.split()[-1]
    lost = {1: 100, 4: 150, 16: 10}[factor]  # at 100 the merge is as far from the adapter model as the base is
    assert EXPLORER.title.get_text() == f"A merge into 4 bits loses {min(lost, 100)} % of the effect"
    places = [dot.get_data() for dot in EXPLORER.dots]
    assert all(x == [pytest.approx(1.5 * factor)] for x, _ in places)
    heights = [y[0] for _, y in places]
    assert heights == pytest.approx([made.cosine, made.nibbles_changed, min(made.kl / made.adapter_kl, 1.3)])


@pytest.mark.long
def test_sizes_of_more_than_a_hundred_percent_are_written_out():
    explorer = SurvivalExplorer(Survival(SURVIVED.sizes, SURVIVED.reports | {128: SURVIVED.reports[16]}))
    axis = explorer.line.axes  # 1.5 % times 128 is 192 %, once 1.9e+02
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1.5", "6", "24", "192"]


def test_the_sentence():
    EXPLORER.set(factor=4, shown="cosine")
    assert EXPLORER.summary() == (
        "A change 4 times the learned one, 6 % of the weights: 2 % of the codes move, cosine 0.20. In detail: merged "
        "into 4 bits the model is 1.2 nats a token from the adapter model, which is 0.8 from its base; cosine of the "
        "layers 0.1 to 0.5"
    )
    assert EXPLORER.code() == "SurvivalExplorer(survived, factor=4, shown='cosine')"


@pytest.mark.long
def test_it_starts_with_what_was_learned_or_with_the_smallest():
    assert EXPLORER._start == {"factor": 1, "shown": "cosine"}
    large = Survival(SURVIVED.sizes, {16: SURVIVED.reports[16], 4: report(0.0, 0.0, [None] * 6, [0.0] * 6)})
    explorer = SurvivalExplorer(large)
    assert explorer.state["factor"] == 4
    assert "cosine 0.00" in explorer.summary()  # an adapter that changes nothing is shown, too


@pytest.mark.long
def test_a_picture_does_not_depend_on_the_one_before_it():
    EXPLORER.set(factor=1, shown="codes moved")
    EXPLORER.set(factor=16, shown="cosine")
    assert SurvivalExplorer(SURVIVED, factor=16).png == EXPLORER.png


def test_a_state_that_is_not_allowed_is_named():
    with pytest.raises(ValueError, match="factor=3 is not allowed: one of 1, 4, 16. Nearest: 4"):
        EXPLORER.set(factor=3)
