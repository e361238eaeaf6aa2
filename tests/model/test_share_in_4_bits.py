"""How much is in 4 bits: counted by hand, told in one line, and warned of where experts are fused."""

import pytest
import torch

from qlora_lab.model.load import load
from qlora_lab.model.quantized_folder import folder_in_4_bits, quantize_folder
from qlora_lab.model.share_in_4_bits import Share, in_4_bits
from tools.families import FAMILIES, quiet, save

LINEAR = 2 * (4 * 16 * 16 + 3 * 16 * 32)  # tiny_llama: four projections and three of the MLP, in two layers
NORMS = 2 * 2 * 16 + 16


def test_all_but_norms_of_a_llama(folder):
    model, _ = load(folder, dtype=torch.float32, progress=False)
    names = ("model.layers.*.input_layernorm.weight", "model.layers.*.post_attention_layernorm.weight")
    assert in_4_bits(model) == Share(LINEAR, LINEAR + NORMS, (*names, "model.norm.weight"))
    assert str(in_4_bits(model)) == "98.5 % of the weights outside embeddings and head are in 4 bits"


def test_nothing_of_a_model_as_it_is(folder):
    model, _ = load(folder, codebook=None, dtype=torch.float32, progress=False)
    assert in_4_bits(model)[:2] == (0, LINEAR + NORMS)


def test_fused_experts_are_named_in_a_warning(tmp_path):
    with quiet():
        save(next(family for family in FAMILIES if family.name == "Mixtral"), tmp_path / "model")
    # by hand: hidden 32, 2 layers; q and o 32 x 32, k and v 16 x 32, the router 4 x 32, four experts of 3 x 48 x 32
    attention, router, experts, norms = 2 * 32 * 32 + 2 * 16 * 32, 4 * 32, 4 * 3 * 48 * 32, 2 * 32
    share = 2 * attention / (2 * (attention + router + experts + norms) + 32)
    names = r"model.layers.\*.mlp.experts.gate_up_proj, .*down_proj, "
    message = rf"^{100 * share:.1f} % of the weights .*; the largest others: {names}"
    with pytest.warns(UserWarning, match=message) as warned:
        model, _ = load(tmp_path / "model", block_size=16, dtype=torch.float32, progress=False)
    assert in_4_bits(model).part == pytest.approx(share) and "\n" not in str(warned[0].message)
    assert warned[0].filename == __file__
    with pytest.warns(UserWarning, match=message):
        quantize_folder(tmp_path / "model", tmp_path / "small", "nf4", 16, progress=False)
    assert folder_in_4_bits(tmp_path / "small") == in_4_bits(model)


def test_at_most_three_names():
    assert str(Share(1, 2, ("a", "b", "c", "d"))).endswith("; the largest others: a, b, c and 1 more")
