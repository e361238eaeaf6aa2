"""The kernel map: what it shows is what the interpreted kernel touches, address by address and byte by byte."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from triton.runtime.interpreter import InterpreterBuilder

from qlora_lab.kernels.triton.dequantize_nf4 import _dequantize_nf4_kernel
from qlora_lab.kernels.triton.launch import words_of
from qlora_lab.quant.codebook import codebook
from qlora_lab.show.figure import IN_DETAIL
from qlora_lab.show.kernel_map import KernelMapExplorer, touched

EXPLORER = KernelMapExplorer()
POISON = -777.0
STATES = st.fixed_dictionaries(
    {
        "weights": st.integers(1, 256),
        "block_size": st.sampled_from([32, 64, 128]),
        "tile": st.sampled_from([32, 64, 128]),
        "program": st.integers(0, 7),
    }
)
START = {"weights": 203, "block_size": 64, "tile": 64, "program": 3}


def tensors(weights, block_size):
    """Packed bytes without a zero code, constants that are all different, a poisoned output with room behind."""
    packed = torch.full((-(-weights // 2),), 0xFF, dtype=torch.uint8)
    return packed, 1 + torch.arange(-(-weights // block_size)).float(), torch.full((weights + 128,), POISON)


def launch(packed, absmax, out, weights, block_size, tile, programs):
    words = words_of(packed, weights)
    arguments = words, absmax, codebook("nf4"), out, len(words), weights, block_size, tile
    _dequantize_nf4_kernel[(programs,)](*arguments)
    return words


def written(state, change=lambda packed, absmax: None):
    """The output of program `program` alone: what the grid with it writes and the grid without it does not."""
    weights, block_size, tile, program = (state[name] for name in START)
    with_it, without = (tensors(weights, block_size) for _ in range(2))
    for programs, (packed, absmax, out) in ((program + 1, with_it), (program, without)):
        change(packed, absmax)
        if programs:
            launch(packed, absmax, out, weights, block_size, tile, programs)
    return torch.where(without[2] == POISON, with_it[2], POISON)


@pytest.mark.long
@settings(max_examples=25)
@given(STATES)
@example(START)
@example({"weights": 1, "block_size": 128, "tile": 32, "program": 0})
def test_one_program_writes_what_the_map_says(state):
    found = touched(**state)
    if state["program"] < found.programs:
        assert (written(state) != POISON).nonzero().view(-1).tolist() == list(found.stored)
    else:
        assert not found.words and not found.stored and not found.spare and not found.idle


@pytest.mark.long
@settings(max_examples=10)
@given(STATES, st.integers(0, 127), st.integers(0, 7))
@example(START, 101, 3)
def test_a_byte_or_a_constant_changes_the_weights_that_the_map_gives_it(state, byte, block):
    found = touched(**state)
    if state["program"] >= found.programs:
        return
    before = written(state)
    packed, absmax, _ = tensors(state["weights"], state["block_size"])
    byte, block = byte % len(packed), block % len(absmax)

    def another_byte(packed, absmax):
        packed[byte] = 0

    def another_constant(packed, absmax):
        absmax[block] = 99

    changed = (written(state, another_byte) != before).nonzero().view(-1).tolist()
    assert changed == [i for i in (2 * byte, 2 * byte + 1) if i in found.stored]
    assert bool(changed) == (byte in found.bytes)  # each byte that is loaded holds a weight that is stored
    changed = (written(state, another_constant) != before).nonzero().view(-1).tolist()
    assert changed == [i for i in found.stored if i // state["block_size"] == block]
    assert bool(changed) == (block in found.constants)


@pytest.mark.long
@settings(max_examples=10)
@given(STATES)
@example(START)
def test_the_interpreters_own_addresses_and_masks(state):
    """Loads and stores of every program, as the interpreter is asked for them."""
    seen = []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def see_load(self, ptrs, mask, *rest):
        seen.append(("load", ptrs.data.ravel().astype(np.int64), mask.data.ravel()))
        return load(self, ptrs, mask, *rest)

    def see_store(self, ptrs, value, mask, *rest):
        seen.append(("store", ptrs.data.ravel().astype(np.int64), mask.data.ravel()))
        return store(self, ptrs, value, mask, *rest)

    packed, absmax, out = tensors(state["weights"], state["block_size"])
    first = touched(**state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", see_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", see_store)
        words = launch(packed, absmax, out, state["weights"], state["block_size"], state["tile"], first.programs)

    per_program = len(seen) // first.programs
    for program in range(first.programs):
        found = touched(**state | {"program": program})
        accesses = seen[program * per_program : (program + 1) * per_program]
        loads = [at[mask] for kind, at, mask in accesses if kind == "load"]
        assert inside(loads, words) == set(found.words)
        assert inside(loads, absmax) == set(found.constants)
        ((_, at, mask),) = [one for one in accesses if one[0] == "store"]
        lanes = (at - out.data_ptr()) // 4
        assert lanes[mask].tolist() == list(found.stored)
        assert lanes[~mask].tolist() == [*found.spare, *found.idle]
        in_words = {4 * word + i for word in found.words for i in range(4)}
        assert in_words == {*found.bytes, *found.padding} and all(byte < len(packed) for byte in found.bytes)


def inside(loads, tensor):
    """Indices of a tensor of four-byte elements among loaded addresses."""
    at = (np.concatenate(loads) - tensor.data_ptr()) // 4
    return set(at[(at >= 0) & (at < len(tensor))].tolist())


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(STATES)
def test_any_state_is_drawn(state):
    EXPLORER.set(**state)
    found = touched(**state)
    assert EXPLORER.result["touched"] == found
    drawn = np.asarray(EXPLORER.cells.get_array()).ravel()
    assert (drawn == 2).nonzero()[0].tolist() == list(found.stored)
    assert len(EXPLORER.crosses.get_xdata()) == len(found.idle) and len(EXPLORER.dots.get_xdata()) == len(found.spare)
    assert len(EXPLORER.blocks.get_segments()) == -(-state["weights"] // state["block_size"])


def test_starts_at_an_odd_tail():
    assert KernelMapExplorer().summary() == (
        "203 weights, blocks of 64, tile 64: program 3 of 4 loads words 24 to 25 and constant 3, and stores weights "
        f"192 to 202{IN_DETAIL}bytes 96 to 101 and 2 of padding; of 64 lanes 5 decode and do not store, 48 load nothing"
    )


@pytest.mark.long
def test_a_program_that_is_not_launched_is_said():
    explorer = KernelMapExplorer(program=4)
    assert explorer.summary().endswith("program 4 is not launched; the last is program 3")
    assert explorer.title.get_text() == "This program is not launched"
    assert not any(line.get_text() for line in explorer.lines)


def test_a_state_that_is_not_allowed_is_named():
    with pytest.raises(ValueError, match=r"block_size=48 is not allowed: one of 32, 64, 128\. Nearest"):
        KernelMapExplorer(block_size=48)
