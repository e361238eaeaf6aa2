"""from_tensors on what is no quantised tensor: KeyError or ValueError, and nothing else, for anything."""

import json
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from qlora_lab.quant.codebook import codebook
from qlora_lab.quant.quantize import dequantize, quantize
from qlora_lab.quant.serialize import from_tensors, to_tensors

LEVELS = torch.tensor([-0.9, -0.3, 0.2, 0.5, 0.95])
WEIGHT = torch.randn(40, 20, generator=torch.Generator().manual_seed(0))
GOOD = {
    "nf4": to_tensors(quantize(WEIGHT), "w"),
    "nested": to_tensors(quantize(WEIGHT, double_quant=True), "w"),
    "int3": to_tensors(quantize(WEIGHT.half(), "int3", 16), "w"),
    "custom": to_tensors(quantize(WEIGHT, LEVELS), "w"),
}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int64, torch.bool]
DTYPES += [torch.complex64, torch.float8_e4m3fn]
NUMBERS = [0, -1, 1, 3, 8, 16, 63, 64, 65, 4096, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e300, True, False]
NUMBERS += [math.nan, math.inf, -math.inf]
ANYTHING = [*NUMBERS, None, "", "64", "nf4", "custom", "float64", [], [64], {}, [[]], "\ud800"]
DAMAGE = [
    "dtype",
    "value",
    "cut",
    "view",
    "meta",
    "sparse",
    "shape",
    "random",
    "expanded",
    "strided",
    "longer",
    "other",
]
FIELDS = ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset", "rotation"]


def encoded(content: bytes) -> torch.Tensor:
    return torch.tensor(list(content), dtype=torch.uint8)


def described(tensors):
    """The key of the description, and what it says."""
    name = next(name for name in tensors if ".quant_state." in name)
    return name, json.loads(bytes(tensors[name].tolist()))


def with_state(tensors, **changes):
    name, state = described(tensors)
    return tensors | {name: encoded(json.dumps(state | changes).encode())}


# ------------------------------------------------------------------------------------------------------- drawn damage

shapes = st.one_of(
    st.lists(st.sampled_from([1, 0, -1, 2, 20, 40, 800, 2**31, 2**62, 2**63, 2**64, True, 0.5, "2"]), max_size=5),
    st.sampled_from([[1] * 65, [2**40] * 60, [800], [40, 20], [20, 40], [799], [801]]),
)


@st.composite
def damaged_states(draw, state):
    kind = draw(st.sampled_from(["field", "fields", "less", "bytes", "cut", "flip", "deep"]))
    if kind == "field":
        return json.dumps(state | {draw(st.sampled_from(FIELDS)): draw(st.sampled_from(ANYTHING) | shapes)}).encode()
    if kind == "fields":
        others = {name: draw(st.sampled_from(ANYTHING)) for name in draw(st.sets(st.sampled_from(FIELDS)))}
        return json.dumps(state | others | {"shape": draw(shapes)}).encode()
    if kind == "less":
        return json.dumps({name: state[name] for name in draw(st.sets(st.sampled_from(sorted(state))))}).encode()
    if kind == "bytes":
        return draw(st.binary(max_size=40))
    text = bytearray(json.dumps(state).encode())
    place = draw(st.integers(0, len(text) - 1))
    if kind == "cut":
        return bytes(text[:place])
    if kind == "deep":
        return b'{"shape":' * draw(st.sampled_from([3, 400, 100_000]))
    text[place] = draw(st.integers(0, 255))
    return bytes(text)


@st.composite
def damaged_parts(draw, part):
    kind = draw(st.sampled_from(DAMAGE))
    if kind == "dtype":
        return part.to(draw(st.sampled_from(DTYPES)))
    if kind == "value" and part.numel():
        worse = part.clone()
        number = draw(st.sampled_from([math.nan, math.inf, -math.inf, -1.0, -0.0, 0.0, 3e38, 255.0, 1e-45]))
        if worse.dtype == torch.uint8:
            number = 0 if not math.isfinite(number) else min(max(int(min(number, 255)), 0), 255)
        worse.view(-1)[draw(st.integers(0, worse.numel() - 1))] = number
        return worse
    if kind == "cut":
        return part.reshape(-1)[: draw(st.integers(0, part.numel()))]
    if kind == "view":
        return part.contiguous().view(torch.int8 if part.dtype == torch.uint8 else torch.int32)
    if kind == "meta":
        return part.to("meta")
    if kind == "sparse":
        return part.to_sparse()
    if kind == "shape":
        return part.reshape(draw(st.sampled_from([(-1,), (-1, 1), (1, -1), (1, 1, -1)])))
    if kind == "random":
        size, dtype = draw(st.sampled_from([0, 1, 13, 400, 800])), draw(st.sampled_from(DTYPES[:7]))
        return torch.ones(size, dtype=dtype)
    if kind == "expanded":
        return part.reshape(-1)[:1].clone().expand(draw(st.sampled_from([400, 2**40])))
    if kind == "strided":
        return part.reshape(-1).repeat_interleave(2)[::2]
    if kind == "longer":
        return torch.cat([part, part])
    return draw(st.sampled_from([None, 3, "text", b"bytes", [1.0], [], {}, object()]))


@st.composite
def damaged_dicts(draw):
    good = GOOD[draw(st.sampled_from(sorted(GOOD)))]
    tensors = dict(good)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(tensors, key=str)))
        kind = draw(st.sampled_from(["state", "part", "part", "gone", "extra", "swap", "table"]))
        if kind == "state":
            described_by = [name for name in tensors if isinstance(name, str) and ".quant_state." in name]
            for where in described_by[:1]:
                _, state = described(GOOD[draw(st.sampled_from(sorted(GOOD)))])
                tensors[where] = encoded(draw(damaged_states(state)))
        elif kind == "part" and name in good and tensors[name] is good[name]:
            tensors[name] = draw(damaged_parts(tensors[name]))
        elif kind == "gone" and len(tensors) > 1:
            del tensors[name]
        elif kind == "extra":
            extra = draw(st.sampled_from([3, None, "w.", "w.quant_state.", "w.quant_state.bitsandbytes__fp4", "w.SCB"]))
            tensors[extra] = draw(st.sampled_from([None, torch.ones(3), encoded(b"{}")]))
        elif kind == "swap":
            tensors[name] = tensors[draw(st.sampled_from(sorted(tensors, key=str)))]
        elif kind == "table":
            tables = [codebook("nf4").flip(0), codebook("nf4")[:9], codebook("fp4"), LEVELS, LEVELS.half(), LEVELS[:1]]
            tensors["w.quant_map"] = draw(st.sampled_from(tables))
    return tensors


def read_or_refuse(tensors, key):
    """Whether it was read; then it dequantises to finite numbers. A refusal is one line."""
    try:
        q = from_tensors(tensors, key)
    except (KeyError, ValueError) as error:
        assert "\n" not in error.args[0] and len(error.args[0]) < 400, error
        return False
    assert q.absmax.isfinite().all() and q.levels.isfinite().all()
    assert dequantize(q, torch.float32).shape == q.shape
    return True


@pytest.mark.long
@settings(max_examples=200)
@given(tensors=damaged_dicts(), key=st.sampled_from(["w"] * 30 + ["", "w.", "v", None, 3, b"w"]))
def test_anything_is_read_or_refused_by_the_documented_errors(tensors, key):
    read_or_refuse(tensors, key)


@pytest.mark.slow
@settings(max_examples=5000)
@given(tensors=damaged_dicts())
def test_5000_damaged_dicts(tensors):
    read_or_refuse(tensors, "w")


# --------------------------------------------------------------------------------------------------------- named cases


@pytest.mark.parametrize("name", GOOD)
def test_what_was_not_damaged_is_read(name):
    assert read_or_refuse(GOOD[name], "w")


@pytest.mark.parametrize("other", [None, 3, [], [("w", WEIGHT)], WEIGHT])
def test_what_is_no_dict_is_refused(other):
    with pytest.raises(ValueError, match="are given: give a dict of tensors and the key of one$"):
        from_tensors(other, "w")


@pytest.mark.parametrize("table", ["reversed", "NaN", "nine levels", "fp4"])
def test_a_table_under_the_name_of_nf4_that_is_not_nf4_is_refused(table):
    nf4 = codebook("nf4")
    tables = {"reversed": nf4.flip(0), "NaN": nf4 * math.nan, "nine levels": nf4[:9], "fp4": codebook("fp4")}
    with pytest.raises(ValueError, match=r"^w.quant_map is not the table of nf4: quantise"):
        from_tensors(GOOD["nf4"] | {"w.quant_map": tables[table]}, "w")


def test_a_description_of_another_type_than_its_name_says_is_refused():
    tensors = with_state(GOOD["nf4"], quant_type="custom")  # its table could then be any
    with pytest.raises(ValueError, match=r"^w.quant_state.bitsandbytes__nf4 describes custom, another type than its"):
        from_tensors(tensors | {"w.quant_map": codebook("nf4")[:9]}, "w")


CHANGES = [
    ({"blocksize": 0}, "cannot be read"),
    ({"blocksize": 2**63}, "w is stored with block_size=9223372036854775808 is not allowed"),
    ({"shape": [2**62, 4]}, r"w has 400 entries, but shape \(4611686018427387904, 4\) needs 9223372036854775808"),
    ({"shape": [2**40] * 60}, r"w has 400 entries, but shape \(1099511627776, 1099511627776, .*, \.\.\.\) needs"),
    ({"shape": [1] * 65}, "cannot be read"),
    ({"shape": [True, 800]}, "cannot be read"),
    ({"nested_offset": 10**400}, "cannot be read"),
    ({"nested_offset": -1.0}, "w has nested_offset=-1, but it is a mean of magnitudes"),
    ({"nested_offset": True}, "cannot be read"),
    ({"nested_dtype": "int8"}, "w has nested_dtype='int8', but only float32 is known"),
]


@pytest.mark.parametrize("changes, message", CHANGES)
def test_a_lie_of_the_description_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        from_tensors(with_state(GOOD["nested"], **changes), "w")


PARTS = [
    ("w", lambda part: part.to("meta"), "w is a torch.strided tensor on meta, but a plain tensor with values"),
    ("w", lambda part: part.to(torch.int64), "w is torch.int64, but uint8, int8, float32"),
    ("w", lambda part: part[:1].clone().expand(400, 1), "w is an expanded view, 400 bytes that are not there"),
    ("w.absmax", lambda part: part.to_sparse(), "w.absmax is a torch.sparse_coo tensor on cpu, but a plain"),
    ("w.absmax", lambda part: None, "w.absmax is NoneType, but a plain tensor"),
    ("w.absmax", lambda part: -part, r"w.absmax holds -[\d.]+, but the constant of a block is at least 0"),
    ("w.absmax", lambda part: part * math.inf, r"w.absmax holds inf at \[0\], but the constant of a block is finite"),
    ("w.absmax", lambda part: part.to(torch.uint8), "w.absmax is torch.uint8, but float32, bfloat16, float16 is need"),
    ("w.quant_map", lambda part: part.tolist(), "w.quant_map is list, but a plain tensor"),
]


@pytest.mark.parametrize("name, change, message", PARTS)
def test_a_part_of_another_kind_is_named(name, change, message):
    with pytest.raises(ValueError, match=message):
        from_tensors(GOOD["nf4"] | {name: change(GOOD["nf4"][name])}, "w")


def test_one_element_of_another_stride_is_read():
    """torch calls it contiguous, and yet does not view it as bytes."""
    strided = torch.zeros(4)[::2][:1]
    assert strided.is_contiguous() and strided.stride() == (2,)
    tensors = to_tensors(quantize(torch.ones(8)), "w") | {"w": strided}
    assert from_tensors(tensors, "w").packed.tolist() == [0, 0, 0, 0]


def test_a_code_beyond_its_table_is_refused():
    """Five levels are codes of three bits: code 7 would read beyond the table."""
    tensors = GOOD["custom"] | {"w": torch.full_like(GOOD["custom"]["w"], 255)}
    with pytest.raises(ValueError, match=r"^w holds code 7, but w.quant_map has 5 levels: "):
        from_tensors(tensors, "w")
