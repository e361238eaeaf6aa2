"""The composed pair: round trips, bounds, edges, and errors that name what is wrong."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from qlora_lab.quant import quantize as module
from qlora_lab.quant.codebook import CODEBOOKS, codebook
from qlora_lab.quant.double_quant import double_dequantize, double_quantize
from qlora_lab.quant.quantize import dequantize, quantize
from qlora_lab.quant.serialize import from_tensors, to_tensors

weights = st.builds(
    lambda seed, n, scale: scale * torch.randn(n, generator=torch.Generator().manual_seed(seed)),
    st.integers(0, 2**31),
    st.integers(1, 2000),
    st.sampled_from([1e-6, 0.02, 1.0, 1e6]),
)


@pytest.mark.long
@given(weight=weights, name=st.sampled_from(CODEBOOKS), block_size=st.integers(16, 300))
def test_error_is_at_most_half_the_widest_gap(weight, name, block_size):
    q = quantize(weight, name, block_size)
    levels = codebook(name).sort().values
    bound = q.absmax.repeat_interleave(block_size)[: len(weight)] * levels.diff().max() / 2
    assert ((dequantize(q) - weight).abs() <= bound * (1 + 1e-6)).all()


@pytest.mark.long
@given(weight=weights, name=st.sampled_from(["nf4", "nf3", "fp4", "e2m1", "int4"]))
def test_quantizing_again_changes_nothing(weight, name):
    once = quantize(weight, name)
    again = quantize(dequantize(once), name)
    assert torch.equal(dequantize(again), dequantize(once))


@pytest.mark.parametrize("shape", [(1,), (7,), (64,), (65,), (3, 5, 7), (33, 100)])
@pytest.mark.parametrize("dtype", module.WEIGHT_DTYPES)
def test_shapes_and_dtypes_return(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    q = quantize(weight, double_quant=True)
    assert dequantize(q).shape == shape and dequantize(q).dtype == dtype
    for other in module.WEIGHT_DTYPES:
        assert torch.equal(dequantize(q, other), dequantize(q, torch.float32).to(other))
    out = torch.full((weight.numel(),), torch.nan)
    assert torch.equal(dequantize(q, out=out), dequantize(q, torch.float32))


def test_layout_does_not_matter():
    weight = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    strided = weight.t().contiguous().t()
    assert not strided.is_contiguous()
    assert torch.equal(quantize(strided).packed, quantize(weight).packed)


@settings(deadline=None, max_examples=30)
@given(weight=weights, name=st.sampled_from(["nf4", "nf3"]), block_size=st.integers(16, 100))
def test_pieces_do_not_show(weight, name, block_size):
    whole = quantize(weight, name, block_size)
    piece, module.PIECE = module.PIECE, 256
    try:
        parts = quantize(weight, name, block_size)
        assert torch.equal(parts.packed, whole.packed) and torch.equal(parts.absmax, whole.absmax)
        assert torch.equal(dequantize(parts), dequantize(whole))
    finally:
        module.PIECE = piece


def test_edges():
    assert not dequantize(quantize(torch.zeros(70))).any()
    assert quantize(torch.zeros(70)).packed.unique().tolist() == [0x77]
    assert torch.equal(dequantize(quantize(torch.full((64,), -3.5))), torch.full((64,), -3.5))
    outlier = torch.cat([torch.full((63,), 0.01), torch.tensor([100.0])])
    assert dequantize(quantize(outlier)).tolist() == [0.0] * 63 + [100.0]
    assert dequantize(quantize(torch.full((64,), 3e38))).isfinite().all()
    odd = quantize(torch.ones(3))
    assert odd.packed.tolist() == [0xFF, 0xF7]  # the missing fourth weight is stored as zero, code 7


def test_bits_count_weights_not_bytes():
    weight = torch.randn(4096, 256, generator=torch.Generator().manual_seed(0))
    assert quantize(weight).bits_per_parameter == 4.5
    double = quantize(weight, double_quant=True)
    by_hand = 4 + 8 / 64 + 32 / (64 * 256) + 32 / weight.numel()  # codes, constants, their scales, one offset
    assert double.bits_per_parameter == by_hand
    assert quantize(weight, "nf3").bits_per_parameter == 3.5 and quantize(weight, "nf2").bits_per_parameter == 2.5


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        quantize(torch.ones(1)).packed = None
    assert "nf4, shape=(2, 32), block_size=64, double_quant, 41 bytes" in repr(
        quantize(torch.ones(2, 32), double_quant=True)
    )


def test_moves_between_devices():
    q = quantize(torch.ones(64), double_quant=True).to("meta")
    assert {q.packed.device.type, q.levels.device.type, q.constants.absmax_codes.device.type} == {"meta"}
    assert quantize(torch.ones(64)).to("meta").constants.device.type == "meta"


@pytest.mark.long
@given(absmax=st.lists(st.floats(2**-10, 10, width=32), min_size=1, max_size=600))
def test_double_quantization_error_is_bounded(absmax):
    absmax = torch.tensor(absmax)
    double = double_quantize(absmax)
    scale = double.absmax_scale.repeat_interleave(256)[: len(absmax)]
    # the widest gap of the dynamic map is 0.9 / 64, and as far from -1 as half of it lies its lowest value
    assert ((double_dequantize(double) - absmax).abs() <= scale * 0.9 / 64 / 2 + 1e-6 * absmax.max()).all()


def test_double_quantization_of_equal_constants_is_exact():
    assert torch.equal(double_dequantize(double_quantize(torch.full((300,), 0.5))), torch.full((300,), 0.5))


def test_codes_do_not_depend_on_double_quantization():
    weight = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantize(weight).packed, quantize(weight, double_quant=True).packed)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_weights(value):
    weight = torch.ones(3, 64)
    weight[1, 5] = value
    with pytest.raises(ValueError, match=r"model.w holds (nan|inf|-inf) at index \(1, 5\): repair it"):
        quantize(weight, name="model.w")
    with pytest.raises(ValueError, match="keep_non_finite"):
        quantize(weight, keep_non_finite=True, double_quant=True)
    kept = dequantize(quantize(weight, keep_non_finite=True))
    assert kept[1].isnan().all() and torch.equal(kept[[0, 2]], weight[[0, 2]])
    assert quantize(weight, keep_non_finite=True).packed[32:64].unique().tolist() == [0x77]


def test_constants_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="block 1 has no finite constant"):
        double_quantize(torch.tensor([1.0, torch.nan]))


@pytest.mark.parametrize(
    "error, message, call",
    [
        (ValueError, "'nf9' is not known", lambda: quantize(torch.ones(64), "nf9")),
        (ValueError, "block_size=8 is not allowed", lambda: quantize(torch.ones(64), block_size=8)),
        (TypeError, "weight is torch.float64", lambda: quantize(torch.ones(64).double())),
        (TypeError, "weight is list", lambda: quantize([1.0])),
        (ValueError, r"shape \(0,\), so there is nothing", lambda: quantize(torch.ones(0))),
        (TypeError, "dtype torch.int8 is not supported", lambda: dequantize(quantize(torch.ones(4)), torch.int8)),
        (ValueError, "out has 3 elements", lambda: dequantize(quantize(torch.ones(4)), out=torch.ones(3))),
        (ValueError, "not contiguous", lambda: dequantize(quantize(torch.ones(4)), out=torch.ones(8)[::2])),
    ],
)
def test_errors_teach(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_serialization_round_trip(name, double_quant):
    q = quantize(torch.randn(37, 11, generator=torch.Generator().manual_seed(0)).half(), name, 32, double_quant)
    tensors = to_tensors(q, "a.b")
    back = from_tensors(tensors, "a.b")
    assert torch.equal(dequantize(back), dequantize(q)) and repr(back) == repr(q) and back.dtype == q.dtype


def test_damaged_checkpoints_are_named():
    tensors = to_tensors(quantize(torch.ones(64, 64), double_quant=True), "w")
    for key in tensors:
        if key == "w.nested_quant_map":
            continue  # written for bitsandbytes; the table is always the same
        with pytest.raises(KeyError, match="w.quant_state" if "quant_state" in key else key):
            from_tensors({k: v for k, v in tensors.items() if k != key}, "w")
    for key in ("w", "w.absmax", "w.nested_absmax"):
        with pytest.raises(ValueError, match=f"{key} has .* entries, but shape \\(64, 64\\) needs"):
            from_tensors(tensors | {key: tensors[key][:0]}, "w")


DAMAGED_STATES = [{"quant_type": 3}, {"blocksize": "64"}, {"blocksize": 0}, {"blocksize": 64.0}, {"blocksize": 8}]
DAMAGED_STATES += [{"shape": "x"}, {"shape": None}, {"shape": [64.0, 2]}, {"shape": [-64, -2]}, {"dtype": None}]
DAMAGED_STATES += [{"nested_offset": value} for value in ("x", None, math.nan, 1e300)] + [{"nested_blocksize": None}]


@pytest.mark.parametrize(
    "damage", [*DAMAGED_STATES, [], None, "", b"\xff\xfe{", torch.ones(3), torch.ones(1, 3).byte()]
)
def test_a_damaged_description_is_named(damage):
    tensors = to_tensors(quantize(torch.randn(64, 2), double_quant=True), "w")
    name = "w.quant_state.bitsandbytes__nf4"
    if isinstance(damage, dict):
        damage = json.loads(bytes(tensors[name].tolist())) | damage
    if not isinstance(damage, (bytes, torch.Tensor)):
        damage = json.dumps(damage).encode()
    if isinstance(damage, bytes):
        damage = torch.tensor(list(damage), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^w[ .].*: |^w groups constants by None|^w is stored with block_size"):
        from_tensors(tensors | {name: damage}, "w")


def test_a_description_that_lacks_a_field_is_named():
    tensors = to_tensors(quantize(torch.randn(64, 2), double_quant=True), "w")
    name = "w.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[name].tolist()))
    for field in ("quant_type", "blocksize", "shape", "dtype", "nested_blocksize", "nested_offset"):
        less = json.dumps({key: value for key, value in state.items() if key != field}).encode()
        with pytest.raises(ValueError, match=r"^w[ .]"):
            from_tensors(tensors | {name: torch.tensor(list(less), dtype=torch.uint8)}, "w")


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table[:-1],
        lambda table: table[None],
        lambda table: table.flip(0),
        lambda table: table.bfloat16(),
        lambda table: table.int(),
        lambda table: table * math.nan,
    ],
)
def test_codes_are_not_read_by_another_table_than_their_name_says(change):
    tensors = to_tensors(quantize(torch.randn(64, 2)), "w")
    with pytest.raises(
        ValueError, match="^w.quant_map is (not the table of nf4|torch.[a-z0-9]+, but float32 is needed there): "
    ):
        from_tensors(tensors | {"w.quant_map": change(tensors["w.quant_map"])}, "w")


def test_nested_constants_that_are_not_finite_are_named():
    tensors = to_tensors(quantize(torch.randn(64, 2), double_quant=True), "w")
    with pytest.raises(ValueError, match="^w has NaN or infinity in its nested constants: "):
        from_tensors(tensors | {"w.nested_absmax": tensors["w.nested_absmax"] * math.inf}, "w")
