"""The block size explorer: its map is the best plan for the budget, and no uniform plan of those bits is better."""

import numpy as np
import pytest

from qlora_lab.measure.best_plan import Choices, best_plan, uniform
from qlora_lab.quant.plan import Candidate, Plan
from qlora_lab.show.block_size import BlockSizeExplorer, apart, names_of, places, stops

NUMEL = 2**16


def choices_of(layers: tuple[str, ...], error: list[list[float]], candidates: tuple[Candidate, ...]) -> Choices:
    """Layers of equal size; bits are those of codes of 4 bits and constants of 32, or of 8 where they are double."""
    each = [NUMEL * (4 + (8 if c.double_quant else 32) / c.block_size) for c in candidates]
    return Choices(layers, (NUMEL,) * len(layers), candidates, np.array(error), np.array([each] * len(layers)))


def sizes(*block_sizes: int) -> tuple[Candidate, ...]:
    return tuple(Candidate("nf4", size, False) for size in block_sizes)


# Two layers and two sizes: one of the two layers can have the small blocks for 4.3125 bits, and q gains more by them.
TWO = choices_of(
    ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"), [[4.0, 10.0], [1.0, 2.0]], sizes(64, 256)
)
SENSITIVITY = np.random.default_rng(0).lognormal(size=12)
LARGER = choices_of(
    tuple(f"model.layers.{i}.{part}_proj" for i in range(4) for part in ("self_attn.q", "self_attn.k", "mlp.up")),
    SENSITIVITY[:, None] * np.array([5.0, 6, 7, 8]),
    sizes(32, 64, 128, 256),
)
EXPLORER = BlockSizeExplorer(LARGER)


@pytest.mark.parametrize("budget", stops(LARGER))
def test_any_state_is_the_best_plan(budget):
    EXPLORER.set(budget=budget)
    plan, result = best_plan(LARGER, budget), EXPLORER.result
    assert result["plan"].error == pytest.approx(plan.error) and plan.bits_per_parameter <= budget
    ranks = EXPLORER.image.get_array()
    assert ranks.shape == (3, 4) and ranks.count() == 12
    order = sizes(256, 128, 64, 32)  # by bits, fewest first
    drawn = {layer: order[int(ranks[cell])] for layer, cell in places(LARGER.layers)[2].items()}
    assert drawn == result["plan"].chosen
    assert sum(result["counts"].values()) == 12
    name, worth = EXPLORER.texts[0].get_text().split(": ")
    assert (name, int(worth)) == ("256", result["counts"][order[0]])
    (x,), (y,) = EXPLORER.point.get_data()
    assert (x, y) == (result["plan"].bits_per_parameter, result["plan"].error)
    candidate, same = result["uniform"]
    assert same == uniform(LARGER, candidate) and same.bits_per_parameter <= budget
    assert result["plan"].error <= same.error * (1 + 1e-9)


@pytest.mark.long
def test_the_sentence_by_hand():
    explorer = BlockSizeExplorer(TWO, budget=4.3125)
    assert explorer.summary() == (
        "Budget 4.3125 bits per parameter, 4.3125 spent: error 6, 50.0 % less than 256 for all. "
        "Layers by block size: 1 with 256; 1 with 64"
    )
    assert explorer.image.get_array().tolist() == [[1], [0]]  # q has 64
    assert explorer.code() == "BlockSizeExplorer(choices, budget=4.3125)"
    explorer.set(budget=4.125)
    assert "error 12, 0.0 % less than 256 for all. Layers by block size: 2 with 256" in explorer.summary()


def test_stops_are_what_uniform_plans_need_and_three_between():
    assert stops(TWO) == [4.125, 4.21875, 4.3125, 4.40625, 4.5]
    thirds = Choices(TWO.layers, (3, 3), TWO.candidates, TWO.error, np.array([[13.0, 12.1], [14.0, 12.2]]))
    assert stops(thirds)[0] == 4.05 and stops(thirds)[-1] == 4.5
    uneven = Choices(TWO.layers, (7, 7), TWO.candidates, TWO.error, np.array([[32.0, 29.0], [32.0, 29.0]]))
    assert stops(uneven)[0] == 4.14286 > 29 / 7 and stops(uneven)[-1] == 4.57143 > 32 / 7  # never too small by rounding


@pytest.mark.long
def test_double_quantization_has_its_own_mark():
    candidates = (*sizes(64), Candidate("nf4", 64, True))
    assert list(names_of(candidates).values()) == ["64", "64, double"]
    several = (*candidates, Candidate("nf3", 64, True))
    assert list(names_of(several).values()) == ["nf4 64", "nf4 64, double", "nf3 64, double"]
    explorer = BlockSizeExplorer(choices_of(TWO.layers, [[4.0, 4.1], [1.0, 1.1]], candidates), budget=4.125)
    assert [text.get_text() for text in explorer.texts] == ["64, double: 2", "64: 0"]
    labels = [line.get_label() for line in explorer.point.axes.lines]
    assert labels[:3] == ["best mix", "one size for all", "the same, double"]


def test_places_read_names():
    blocks, names, cells = places(("model.layers.9.mlp.up_proj", "model.layers.10.mlp.up_proj", "lm_head"))
    assert (blocks, names) == ([0, 9, 10], ["up", "lm_head"])
    assert cells == {
        "model.layers.9.mlp.up_proj": (0, 1),
        "model.layers.10.mlp.up_proj": (0, 2),
        "lm_head": (1, 0),
    }


def test_words_that_end_two_projections_are_written_out():
    """GPT-2 has two of c_proj in a block, and a mixture of experts has many of up_proj."""
    gpt2 = places(("transformer.h.0.attn.c_proj.weight", "transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"))
    assert gpt2[1] == ["attn.c_proj", "c_fc", "mlp.c_proj"] and list(gpt2[2].values()) == [(0, 0), (1, 0), (2, 0)]
    experts = places(tuple(f"model.layers.{i}.experts.{j}.up_proj" for i in (0, 1) for j in (0, 1)))
    assert experts[:2] == ([0, 1], ["experts.0.up_proj", "experts.1.up_proj"])
    assert places(("0", "2.fc"))[:2] == ([0], ["0", "fc"])  # of a Sequential


def test_two_layers_in_one_cell_are_named():
    layers = ("vision.layers.0.up_proj", "text.layers.0.up_proj")
    with pytest.raises(ValueError, match=r"vision\..*_proj and text\..*_proj share one place on the map, block 0, up"):
        BlockSizeExplorer(choices_of(layers, [[1.0, 2.0]] * 2, sizes(64, 256)))


@pytest.mark.long
def test_one_layer_without_any_error():
    """As of a weight that is zero everywhere."""
    explorer = BlockSizeExplorer(choices_of(("lm_head",), [[0.0, 0.0]], sizes(64, 256)), budget=4.125)
    assert explorer.summary() == (
        "Budget 4.125 bits per parameter, 4.1250 spent: error 0, as much as 256 for all. "
        "Layers by block size: 1 with 256"
    )


@pytest.mark.slow
def test_a_picture_does_not_depend_on_the_one_before_it():
    """Names so long that the key makes room for them, with one digit behind them or two."""
    candidates = tuple(Candidate(f"nf{bits}", size, True) for bits in (4, 3) for size in (512, 1024))
    choices = choices_of(LARGER.layers, SENSITIVITY[:, None] * np.array([5.0, 6, 7, 8]), candidates)
    explorer = BlockSizeExplorer(choices)
    for budget in (stops(choices)[0], stops(choices)[-1]):
        explorer.set(budget=budget)
        assert BlockSizeExplorer(choices, budget=budget).png == explorer.png


def test_names_on_the_frontier_are_apart():
    """Of points at 100, 90, 89, 95 and 0 the third is too near to the second, and the fourth lies above it."""
    plans = [Plan("", {}, error, bits, {}) for bits, error in enumerate((100.0, 90.0, 89.0, 95.0, 0.0))]
    assert [plan.error for plan in apart(plans)] == [100, 90, 0]


@pytest.mark.long
def test_a_state_that_is_not_allowed_is_named():
    with pytest.raises(ValueError, match=r"budget=3 is not allowed: one of 4\.125, .*Nearest: 4\.125"):
        BlockSizeExplorer(TWO, budget=3)
