"""A prompt through the kernels leaves the cache as the readable step does, whatever the model is made of."""

import pytest
import torch
from transformers import Qwen2Config

from qlora_lab.infer import fast, int8, prompt, step as readable
from qlora_lab.infer.cache import make_cache
from qlora_lab.infer.stack import read_stack
from qlora_lab.kernels import vector
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


def test_in_int8_the_same_numbers_are_rounded(packed):
    """A number that lies between two whole ones may go the other way: 1/254 of a block's largest, once in a while."""
    assert_same(int8.with_int8(read_stack(adapted(packed, 4))), bound=0.01)


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
