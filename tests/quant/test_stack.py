"""A stack is its matrices, each quantised alone: bits, files, moves, and what is refused."""

import json
import pickle

import pytest
import torch
from hypothesis import given, settings, strategies as st

from qlora_lab.quant.quantize import dequantize, quantize
from qlora_lab.quant.stack import (
    STATE,
    dequantize_stack,
    quantize_stack,
    stack_from_tensors,
    stack_to_tensors,
    stored_as,
)

KEY = "experts.down_proj"


def drawn(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    return torch.equal(a.packed, b.packed) and torch.equal(a.absmax, b.absmax) and a.shape == b.shape


@pytest.mark.long
@settings(max_examples=30)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 33)),  # odd lengths and partial blocks
    st.sampled_from(["nf4", "fp4", "int3"]),
    st.sampled_from([16, 32, 64]),
    st.booleans(),
)
def test_members_are_matrices_quantised_alone(shape, codebook, block_size, double_quant):
    weight = drawn(shape)
    stack = quantize_stack(weight, codebook, block_size, double_quant)
    alone = [quantize(matrix, codebook, block_size, double_quant) for matrix in weight]
    assert len(stack) == shape[0] and all(map(same, stack.members, alone))
    assert torch.equal(dequantize_stack(stack), torch.stack([dequantize(q) for q in alone]))
    assert stack.nbytes == sum(q.nbytes for q in alone) and stack.numel == weight.numel()
    again = stack_from_tensors(stack_to_tensors(stack, KEY), KEY)
    assert all(map(same, again.members, alone)) and again.double_quant == double_quant
    assert stored_as(stack_to_tensors(stack, KEY), KEY) == (codebook, block_size, double_quant)


def test_a_view_that_lies_turned_is_quantised_as_it_reads():
    weight = drawn((3, 40, 24))
    stack = quantize_stack(weight.transpose(1, 2), block_size=16)
    assert same(stack[2], quantize(weight[2].t(), block_size=16)) and stack.shape == (3, 24, 40)


def test_what_is_read_is_not_copied():
    tensors = stack_to_tensors(quantize_stack(drawn((3, 8, 64)), double_quant=True), KEY)
    stack = stack_from_tensors(tensors, KEY)
    assert stack[1].packed.untyped_storage().data_ptr() == tensors[KEY].untyped_storage().data_ptr()


def test_copies_and_moves_keep_the_bits():
    stack = quantize_stack(drawn((3, 8, 64)), double_quant=True)
    assert stack.members is stack.members  # made once
    again = pickle.loads(pickle.dumps(stack))
    assert same(again[1], stack[1]) and same(stack.to("cpu")[2], stack[2])
    assert stack.to("meta").device.type == "meta"
    want = f"QuantizedStack(nf4, shape=(3, 8, 64), block_size=64, double_quant, {stack.nbytes:,} bytes, 4.2"
    assert repr(stack).startswith(want) and stack.bits_per_parameter == 8 * stack.nbytes / (3 * 8 * 64)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"w has shape \(8, 64\), but a stack needs \(matrices, rows, columns\)"):
        quantize_stack(torch.ones(8, 64), name="w")
    broken = drawn((3, 8, 64))
    broken[1, 0, 5] = torch.nan
    with pytest.raises(ValueError, match=r"w\[1\] holds nan at index \(0, 5\)"):
        quantize_stack(broken, name="w")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda t: t.pop(f"{KEY}.{STATE}"), "stack_state cannot be read"),
        (lambda t: t.update({f"{KEY}.{STATE}": torch.zeros(5, dtype=torch.uint8)}), "stack_state cannot be read"),
        (
            lambda t: t.update({f"{KEY}.absmax": t[f"{KEY}.absmax"][:2]}),
            "absmax has shape .*, but there are 3 matrices",
        ),
        (lambda t: t.update({KEY: t[KEY].reshape(-1)}), r"down_proj has shape \(768,\), but there are 3 matrices"),
        (lambda t: t.update({KEY: t[KEY].view(torch.bfloat16)}), "down_proj is torch.bfloat16, but torch.uint8 is"),
        (lambda t: t.update({f"{KEY}.absmax": t[f"{KEY}.absmax"].float()}), "absmax is torch.float32, but torch.uint8"),
        (
            lambda t: t.update({f"{KEY}.nested_offset": torch.ones(3, 2)}),
            r"nested_offset has shape \(3, 2\), but there",
        ),
        (lambda t: t.pop(f"{KEY}.nested_offset"), "absmax is torch.uint8, but torch.float32 is needed there"),
        (lambda t: t.update({f"{KEY}.{STATE}": torch.tensor(7)}), "stack_state cannot be read"),
        (lambda t: t.update({KEY: t[KEY][:, :-1]}), "has 255 entries, but shape"),
        (lambda t: t[f"{KEY}.nested_offset"].fill_(-1), "nested_offset=-1, but it is a mean of magnitudes"),
        (lambda t: t[f"{KEY}.nested_absmax"].fill_(torch.inf), "NaN or infinity in its nested constants"),
        (lambda t: t.pop(f"{KEY}.nested_absmax"), "nested_absmax is missing"),
        (lambda t: t.pop(f"{KEY}.absmax"), "absmax is missing"),
        (lambda t: t.pop(KEY), "down_proj is missing: the checkpoint is incomplete"),
        *(
            (lambda t, bad=bad: t[f"{KEY}.nested_offset"][1:2].fill_(bad), "nested_offset has NaN or infinity")
            for bad in (torch.nan, torch.inf)
        ),
        (lambda t: t.update({f"{KEY}.{STATE}": of_a_matrix(t)}), "stack_state cannot be read"),
    ],
)
def test_damage_is_named(damage, message):
    tensors = stack_to_tensors(quantize_stack(drawn((3, 8, 64)), double_quant=True), KEY)
    damage(tensors)
    with pytest.raises((ValueError, KeyError), match=message):
        stack_from_tensors(tensors, KEY)


def of_a_matrix(tensors):
    state = json.loads(bytes(tensors[f"{KEY}.{STATE}"].tolist())) | {"shape": [24, 64]}
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
