"""A LLaMA whose sizes the kernel takes, and the same model dequantised, as transformers computes it."""

import copy

import pytest
import torch
from torch import nn

from bench import decode_equal
from qlora_lab.model.linear4bit import quantize_linears

SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"num_key_value_heads": 1, "vocab_size": 280, "max_position_embeddings": 64, "initializer_range": 0.2}


def small(seed: int = 0, config=None, **changes) -> nn.Module:
    """A model with two layers and two heads of 64, which share their keys; drawn with `seed`."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = (config or LlamaConfig)(**(SHAPE | changes))
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms begin as ones, and biases as zeros: neither would show a mistake
                parameter.data += 0.1 * torch.randn(parameter.shape)
    model.generation_config.eos_token_id = None
    return model


def dequantised(model: nn.Module) -> nn.Module:
    """The model with plain layers in float32, as transformers computes it."""
    return decode_equal.dequantised(copy.deepcopy(model))


@pytest.fixture
def packed(with_kernels):
    """`small` in NF4."""
    return quantize_linears(small())
