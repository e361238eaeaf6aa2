"""Least times of a product, worked by hand from a data sheet; no kernel is compiled."""

import pytest

from qlora_lab.gpu_code.aot import Report
from qlora_lab.gpu_code.machine_code import KINDS
from qlora_lab.gpu_code.roofline import product_times, stops_paying

SHAPE = (4096, 2048)
WEIGHTS = 4096 * 2048


def report(rung: str, per_weight: float, least: float, tokens: int | None = None, **other) -> Report:
    """As the compiler would report it, of an H100 and bf16."""
    mix = dict.fromkeys(KINDS, 0.0) | {"tensor core": 0.125 if tokens else 0.0, "integer": per_weight}
    fields = {"kernel": f"_{rung}_kernel", "arch": 90, "dtype": "bfloat16", "warps": 4, "registers": 64, "shared": 0}
    fields |= {"local": 0, "spills": 0, "occupancy": 1.0, "instructions": 100, "weights": 32.0, "accesses": {}}
    fields |= {"loop": bool(tokens), "mix": mix, "moved": least} | other
    return Report(rung=rung, per_weight=per_weight, least=least, tokens=tokens, **fields)


DECODE = report("dequantize_double", 8.0, 2.5)
FUSED = report("matmul_nf4", 8.0, 0.5, tokens=128)


def test_one_token_waits_for_memory_or_for_decoding():
    (one,) = product_times(DECODE, FUSED, "H100", SHAPE, [1])
    moved = 2 * (WEIGHTS + 4096 + 2048)  # W, x and y in bf16
    decoding = 8 * WEIGHTS / 32 / (4 * 132 * 1.98e9)  # warps' instructions, over schedulers and clock
    assert one.ready == pytest.approx(moved / 3350e9)
    assert one.fused == pytest.approx(decoding) and decoding > (0.5 * WEIGHTS + 2 * 6144) / 3350e9
    assert one.in_turn == pytest.approx(decoding + 2 * WEIGHTS / 989e12)
    assert one.separate == pytest.approx(2.5 * WEIGHTS / 3350e9 + one.ready)


def test_many_tokens_wait_for_the_tensor_cores():
    (many,) = product_times(DECODE, FUSED, "H100", SHAPE, [8192])
    product = 2 * 8192 * WEIGHTS / 989e12
    assert many.ready == pytest.approx(product)
    assert many.separate == pytest.approx(product + 2.5 * WEIGHTS / 3350e9)
    assert many.in_turn == pytest.approx(product + 64 * 8 * WEIGHTS / 32 / (4 * 132 * 1.98e9))


def test_a_token_more_than_a_tile_decodes_the_weight_again():
    slow = report("matmul_nf4", 32.0, 0.5, tokens=128)  # waits for its instructions
    full, more = product_times(DECODE, slow, "H100", SHAPE, [128, 129])
    assert more.fused == pytest.approx(2 * full.fused)


def test_times_never_fall_and_lie_in_order():
    times = product_times(DECODE, FUSED, "H100", SHAPE, range(1, 700, 7))
    for name in ("ready", "fused", "in_turn", "separate"):
        values = [getattr(one, name) for one in times]
        assert values == sorted(values)
    assert all(one.fused <= one.in_turn and one.ready < one.separate for one in times)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 1, 3, 3], [2, 2, 2, 2], 30),
        ([1, 3, 1, 3], [2, 2, 2, 2], 40),
        ([3, 3, 3, 3], [2, 2, 2, 2], 10),
        ([1, 1, 1, 1], [2, 2, 2, 2], None),
    ],
)
def test_stops_paying(one, other, expected):
    assert stops_paying([10, 20, 30, 40], one, other) == expected


@pytest.mark.parametrize(
    ("decode", "card", "message"),
    [
        (DECODE, "H300", "card 'H300' is not known: choose from A100, H100, H200, RTX 4090, T4"),
        (DECODE, "A100", "compiled for sm_90 and sm_90, but the A100 needs sm_80"),
        (
            report("dequantize_double", 8.0, 2.5, dtype="float32"),
            "H100",
            "in float32 and bfloat16, but the H100",
        ),
    ],
)
def test_what_does_not_match_is_named(decode, card, message):
    with pytest.raises(ValueError, match=message):
        product_times(decode, FUSED, card, SHAPE, [1])


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match="tokens=0"):
        product_times(DECODE, FUSED, "H100", SHAPE, [0])
