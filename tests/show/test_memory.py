"""The memory explorer: its bars are the ledger's, its cards the smallest that hold them."""

import pytest
from hypothesis import given, settings, strategies as st

from qlora_lab.memory.fit import fit
from qlora_lab.memory.ledger import PHASES
from qlora_lab.memory.predict import predict_memory
from qlora_lab.show.figure import IN_DETAIL
from qlora_lab.show.memory import CARDS, GIB, GROUPS, METHODS, MemoryExplorer, _gib, at_peak, card_for
from qlora_lab.show.slider import Slider

EXPLORER = MemoryExplorer()
START = EXPLORER.state
STATES = {
    name: st.sampled_from(control.choices) if isinstance(control, Slider) else st.booleans()
    for name, control in EXPLORER._controls.items()
}


def widths(collection) -> list[float]:
    """Of the rectangles, in the units of their axis."""
    outlines = [path.vertices for path in collection.get_paths()]
    return [right - left for (left, _), (right, _), *_ in outlines]


@pytest.mark.long
@settings(max_examples=8, deadline=None)
@given(st.fixed_dictionaries(STATES))
def test_any_state(state):
    EXPLORER.set(**state)
    drawn, strip, n = widths(EXPLORER.bars), widths(EXPLORER.strip), len(GROUPS)
    for number, method in enumerate(METHODS):
        peak, card = EXPLORER.result["peak"][method], EXPLORER.result["card"][method]
        assert sum(drawn[number * n : (number + 1) * n]) == pytest.approx(peak / GIB)
        assert card is None or peak <= card * GIB
        assert all(peak > smaller * GIB for smaller in CARDS if card is None or smaller < card)
    assert sum(strip) == pytest.approx(100)


def test_the_start_is_the_ledger_of_its_setup():
    EXPLORER.reset()
    ledger = predict_memory("llama-7b", r=64, length=512, batch_size=1, gradient_checkpointing=True)
    assert EXPLORER.result["peak"]["qlora"] == ledger.peak and EXPLORER.result["phase"]["qlora"] == ledger.phase
    assert sum(widths(EXPLORER.bars)[-len(GROUPS) :]) == pytest.approx(ledger.peak / GIB)


def test_groups_add_up_in_every_phase():
    ledger = predict_memory("llama-3-8b", batch_size=2)
    assert set(ledger.groups) <= set(GROUPS)
    for phase in PHASES:
        assert sum(at_peak(ledger, phase).values()) == ledger.at(phase)


@pytest.mark.parametrize(
    ("field", "less", "more"),
    [
        ("model", "llama-7b", "llama-2-70b"),
        ("codebook", "nf2", "nf4"),
        ("block_size", 512, 16),
        ("double_quant", True, False),
        ("r", 1, 256),
        ("length", 128, 65536),
        ("rows", 1, 16),
        ("gradient_checkpointing", True, False),
        ("optimizer", "paged 8-bit AdamW", "8-bit AdamW"),
        ("optimizer", "8-bit AdamW", "AdamW"),
    ],
)
def test_every_control_costs_what_it_should(field, less, more):
    peaks = [EXPLORER.compute({**START, field: value})["peak"]["qlora"] for value in (less, more)]
    assert peaks[0] < peaks[1]


def test_a_card_is_full_at_its_last_byte():
    assert [card_for(8 * GIB), card_for(8 * GIB + 1), card_for(80 * GIB), card_for(80 * GIB + 1)] == [8, 16, 80, None]


def test_it_agrees_with_fit():
    """Nothing is switched on by fit where the explorer says that a card is large enough."""
    setup = {"r": 64, "length": 512, "batch_size": 1, "gradient_checkpointing": True}
    card = EXPLORER.compute(START)["card"]["qlora"]
    assert fit("llama-7b", card, **setup).switched == ()


@pytest.mark.long
def test_the_sentence():
    EXPLORER.reset()
    EXPLORER.set(model="llama-65b", rows=2, gradient_checkpointing=False, double_quant=False, optimizer="paged AdamW")
    result = EXPLORER.result
    line, details = EXPLORER.summary().split(IN_DETAIL)
    assert line.startswith(f"QLoRA needs {_gib(result['peak']['qlora'])}, ") and line.endswith("too large for 80 GB")
    assert details.startswith("llama-65b, nf4/64, r=64, 2 x 512 tokens at once, paged AdamW: QLoRA's peak is ")
    assert details.endswith(f"runtime {_gib(result['groups']['qlora']['runtime'])}")
    assert f"activations {result['groups']['qlora']['activations'] / GIB:.1f} GiB" in details
    assert EXPLORER.peaks[0].get_text().endswith("→")  # the bar leaves the picture


def test_sizes_have_three_digits_and_fit_the_key():
    sizes = [0, 9.994, 9.996, 99.94, 99.96, 999, 1000, 40.3 * 1024, 2**20]
    written = ["0.00 GiB", "9.99 GiB", "10.0 GiB", "99.9 GiB", "100 GiB", "999 GiB", "0.98 TiB", "40.3 TiB", "1024 TiB"]
    assert [_gib(size * GIB) for size in sizes] == written


def test_a_state_that_is_not_allowed_is_named():
    with pytest.raises(ValueError, match="rows=3 is not allowed: one of 1, 2, 4, 8, 16. Nearest: 2"):
        EXPLORER.set(rows=3)
