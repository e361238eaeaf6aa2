"""A prompt through the kernels leaves the cache as the readable step does, whatever the model is made of."""

import pytest
import torch
from transformers import Qwen2Config

from qlora_lab.infer import fast, int8, prompt, step as readable
from qlora_lab.infer.cache import make_cache
from qlora_lab.infer.stack import read_stack
from qlora_lab.kernels import prompt_gate, prompt_pairs, vector, words
from qlora_lab.model.linear4bit import quantize_linears
from tests.infer.conftest import small
from tests.infer.test_step import BOUND, IDS, adapted

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not vector.is_fast(), reason="this CPU does not look up 16 codes at once"),
]


def kept_by(forward, stack, parts, bits=32):
    """Keys and values (2, layers, key heads, tokens, head_dim) of IDS, read in parts, in a cache that was all NaN."""
    cache = make_cache(stack, 1, len(IDS), bits)
    for part in cache.kept:
        part.fill_(torch.nan if part.is_floating_point() else 255)
    with torch.no_grad():
        for some in IDS.split(parts):
            forward(stack, some, cache)
    assert cache.lengths.tolist() == [len(IDS)]
    if bits == 32:
        return torch.stack([cache.keys[:, 0], cache.values[:, 0]])
    codes = torch.stack([cache.keys[:, 0], cache.values[:, 0]]).float() - 128
    return codes * torch.stack([cache.key_absmax[:, 0], cache.value_absmax[:, 0]])[..., None] / 127


def assert_same(stack, parts=(22, 18), bits=32, bound=BOUND):
    wanted, found = (kept_by(forward, stack, list(parts), bits) for forward in (readable.forward, prompt.forward))
    error = (found - wanted).abs().max() / wanted.abs().max()
    assert error < bound, f"{error:.1e}"


MODELS = {
    "llama": {},
    "qwen2, which has biases": {"config": Qwen2Config},
    "four heads for each key head": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_the_cache_is_that_of_the_readable_step(changes, with_kernels):
    stack = read_stack(quantize_linears(small(**changes)))
    assert fast.can_step(stack)
    assert_same(stack)


@pytest.mark.parametrize("parts", [(40,), (1, 39), (30, 10)], ids=str)
def test_a_prompt_may_come_in_parts_of_any_size(parts, packed):
    assert_same(read_stack(packed), parts)


def test_adapters_stand_beside_the_products(packed):
    assert_same(read_stack(adapted(packed, 4)))


def test_weights_that_are_not_packed(with_kernels):
    assert_same(read_stack(small()))


def test_a_cache_of_8_bits(packed):
    """Where the two differ in the last bit, a code may differ by 1 of 127, and all that follows by a part of that."""
    assert_same(read_stack(packed), bits=8, bound=1 / 127)


@pytest.mark.parametrize("rank", [0, 4], ids=["gate and up in one pass", "with adapters"])
def test_in_int8_the_same_numbers_are_rounded(rank, packed, monkeypatch):
    """A number that lies between two whole ones may go the other way: 1/254 of a block's largest, once in a while."""
    monkeypatch.setattr(prompt_pairs, "can_attend", lambda head_dim: False)
    calls, multiply = [], prompt_gate.multiply
    monkeypatch.setattr(prompt_gate, "multiply", lambda *given: calls.append(1) or multiply(*given))
    assert_same(int8.with_int8(read_stack(adapted(packed, rank) if rank else packed)), bound=0.01)
    assert len(calls) == (0 if rank else 2)  # once for each part of the prompt: the last layer has no use for it


def test_gate_and_up_of_the_size_of_what_they_read(with_kernels):
    """Rows of one size share their memory, so such a layer takes two passes."""
    assert_same(int8.with_int8(read_stack(quantize_linears(small(intermediate_size=128)))), bound=0.02)


@pytest.mark.skipif(not words.has_pairs(), reason="needs AVX512-BF16")
def test_in_int8_attention_may_be_in_bf16(packed, monkeypatch):
    """Only there: a float32 prompt stays as it is. What follows errs little more than with attention in float32."""
    calls, attend = [], prompt_pairs.attend
    monkeypatch.setattr(prompt_pairs, "attend", lambda *given: calls.append(1) or attend(*given))
    stack = read_stack(packed)
    assert_same(stack)
    assert not calls
    rounded = int8.with_int8(stack)
    found = kept_by(prompt.forward, rounded, [22, 18])
    assert len(calls) == 2  # parts of the prompt: the last layer attends to nothing
    exact, wanted = (kept_by(readable.forward, each, [22, 18]) for each in (stack, rounded))
    assert 0.1 < (found - wanted).norm() / (wanted - exact).norm() < 1  # it counts, and for less than int8 does
    assert (found - exact).norm() < 1.2 * (wanted - exact).norm()  # two errors without a common cause hardly add up


@pytest.mark.parametrize("bits, bound", [(32, BOUND), (8, 1 / 127)])
def test_one_token_is_one_call(bits, bound, packed, monkeypatch):
    monkeypatch.setattr(prompt, "forward", None)
    stack = read_stack(adapted(packed, 4))
    wanted, found = (kept_by(forward, stack, [1] * 40, bits) for forward in (readable.forward, readable.read_prompt))
    assert (found - wanted).abs().max() / wanted.abs().max() < bound


def test_one_token_names_the_layer_of_a_nan(packed):
    packed.model.layers[0].post_attention_layernorm.weight.data[3] = torch.nan
    stack = read_stack(packed)
    cache = make_cache(stack, 1, 2)
    with pytest.raises(FloatingPointError, match="layer 0 of 2 computes a number that is not finite"):
        readable.read_prompt(stack, IDS[:1], cache)
    assert cache.lengths.tolist() == [0]


def test_a_layer_that_computes_a_nan_is_named(packed):
    with torch.no_grad():
        for norm, name in ((0, "post_attention_layernorm"), (0, "input_layernorm")):
            weight = getattr(packed.model.layers[norm], name).weight
            weight[3] = torch.nan
            stack = read_stack(packed)
            with pytest.raises(FloatingPointError, match="layer 0 of 2 computes a number that is not finite"):
                prompt.forward(stack, IDS, make_cache(stack, 1, 40))
            weight[3] = 1


def test_a_full_cache_is_refused(packed):
    stack = read_stack(packed)
    with pytest.raises(ValueError, match="40 tokens do not fit into a cache of 39"):
        prompt.forward(stack, IDS, make_cache(stack, 1, 39))
