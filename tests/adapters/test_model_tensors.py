"""One walk over a model's tensors, for the table of dtypes and for the measured ledger."""

import pytest
import torch
from torch import nn

from qlora_lab.adapters.lora import LoRALinear
from qlora_lab.adapters.model_tensors import model_tensors
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.quant.quantize import quantize


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 64)
        self.norm = nn.LayerNorm(64)
        self.up = LoRALinear(Linear4bit(quantize(torch.randn(64, 64)), nn.Parameter(torch.zeros(64))), r=2)
        self.down = nn.Linear(64, 64)
        self.lm_head = nn.Linear(64, 8, bias=False)
        self.lm_head.weight = self.embed.weight  # tied: comes twice
        self.register_buffer("inv_freq", torch.ones(4))


def test_every_tensor_comes_with_its_kind():
    toy = Toy()
    kinds = [kind for kind, _ in model_tensors(toy)]
    assert kinds == [
        *("rotary frequencies", "embeddings", "norms", "biases", "lora_A", "lora_B"),
        *("packed weights", "biases", "linear layers", "biases", "head"),
    ]
    tensors = [tensor for _, tensor in model_tensors(toy)]
    assert tensors[1] is tensors[-1] is toy.embed.weight
    assert tensors[kinds.index("packed weights")] is toy.up.base.weight


class HeadNorm(nn.Module):
    """Known by the name of its class alone."""


def holding(module, name, *shape):
    module.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    return module


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (holding(nn.Module(), "gate_up_proj_bias", 4, 6), "biases"),  # GPT-OSS: a row for each expert
        (holding(nn.Module(), "mm_input_projection_weight", 4, 4), "other tensors"),  # Gemma 3's projector
        (holding(nn.Module(), "in_proj_weight", 6, 2), "other tensors"),  # of SigLIP's pooling
        (nn.Conv2d(3, 4, 2, bias=False), "other tensors"),  # CLIP's patches
        (holding(HeadNorm(), "weight", 2, 4), "norms"),  # Cohere: a row for each head
        (holding(nn.Module(), "weight", 4), "norms"),
        (holding(nn.Module(), "weight", 4, 2), "routers"),
    ],
)
def test_only_vectors_and_norms_are_norms(module, kind):
    assert [kind for kind, _ in model_tensors(nn.ModuleList([module]))] == [kind]
