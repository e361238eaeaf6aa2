"""Operations by formula, against torch's own count on models that compute."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qlora_lab.adapters.add_adapter import add_adapter
from qlora_lab.memory.setup import Setup
from qlora_lab.memory.shape import shape_of
from qlora_lab.memory.work import nothing_added, work

OPTIONS = {"lora": {"r": 3}, "houlsby": {"size": 5}, "prefix": {"virtual_tokens": 7}, "prompt": {"virtual_tokens": 7}}
OPTIONS |= {"zero_bias": {}, "full": {}}


def counted(model, tokens):
    ids = torch.arange(3, 3 + tokens)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=1)
    return counter.get_total_flops()


@pytest.fixture
def eager(tiny_llama):
    tiny_llama.config._attn_implementation = "eager"  # torch counts the products of its parts
    return tiny_llama


@pytest.mark.parametrize("method", OPTIONS)
def test_the_formula_is_torchs_count(eager, method):
    model = add_adapter(deepcopy(eager), method, **OPTIONS[method])
    rotary = counted(eager, 9) - nothing_added(shape_of(eager), Setup(), 9)
    # positions times frequencies, which is no product of weights
    assert 0 <= rotary <= 2 * 9 * eager.config.hidden_size
    setup = Setup(method=method, **OPTIONS[method])
    more = rotary * (9 + 7 * (method == "prompt")) / 9
    assert counted(model, 9) == work(shape_of(eager), setup, 9) + more


def test_what_each_method_adds():
    """LLaMA-7B by hand: 32 layers, d = 4096, f = 11008; 16 (out + in) of each of its seven matrices."""
    shape = shape_of("llama-7b")
    base = nothing_added(shape, Setup(), 64)
    assert base == 2 * 64 * 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096 * 64) + 2 * 32000 * 4096
    lora = 2 * 64 * 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert work(shape, Setup(r=16), 64) - base == lora
    houlsby = Setup(method="houlsby", size=64)
    assert work(shape, houlsby, 64) - base == 2 * 64 * 32 * 4 * 64 * 4096
    prefix = Setup(method="prefix", virtual_tokens=20)
    assert work(shape, prefix, 64) - base == 2 * 64 * 32 * 2 * 4096 * 20
    prompt = Setup(method="prompt", virtual_tokens=20)
    assert work(shape, prompt, 64) == nothing_added(shape, Setup(), 84)
    assert work(shape, replace(prompt, method="zero_bias"), 64) == base
