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


def saved(name, folder):
    with quiet():
        save(next(family for family in FAMILIES if family.name == name), folder)
    return folder


def test_weights_that_stay_are_named_in_a_warning(tmp_path):
    saved("Mamba", tmp_path / "model")
    # by hand: hidden 32, inner 64, 2 layers; in_proj 128 x 32; of what the family uses itself, out_proj 32 x 64, x_proj
    # 18 x 64, dt_proj 64 x 2 and its bias, A_log 64 x 8, D 64, a convolution of 64 x 4 and its bias, and norms
    packed, others = 128 * 32, 32 * 64 + 18 * 64 + 64 * 2 + 64 + 64 * 8 + 64 + 64 * 4 + 64 + 32
    share = 2 * packed / (2 * (packed + others) + 32)
    names = r"backbone.layers.\*.mixer.out_proj.weight, .*x_proj.weight, .*A_log"
    message = rf"^{100 * share:.1f} % of the weights .*; the largest others: {names}"
    with pytest.warns(UserWarning, match=message) as warned:
        model, _ = load(tmp_path / "model", block_size=16, dtype=torch.float32, progress=False)
    assert in_4_bits(model).part == pytest.approx(share) and "\n" not in str(warned[0].message)
    assert warned[0].filename == __file__
    with pytest.warns(UserWarning, match=message):
        quantize_folder(tmp_path / "model", tmp_path / "small", "nf4", 16, progress=False)
    assert folder_in_4_bits(tmp_path / "small") == in_4_bits(model)


@pytest.mark.long
def test_experts_are_counted_and_their_router_is_not(tmp_path):
    saved("Mixtral", tmp_path / "model")
    # hidden 32, 2 layers; q and o 32 x 32, k and v 16 x 32, the router 4 x 32, four experts of 3 x 64 x 32
    attention, router, experts, norms = 2 * 32 * 32 + 2 * 16 * 32, 4 * 32, 4 * 3 * 64 * 32, 2 * 32
    model, _ = load(tmp_path / "model", block_size=16, dtype=torch.float32, progress=False)
    share = in_4_bits(model)
    assert share[:2] == (2 * (attention + experts), 2 * (attention + experts + router + norms) + 32)
    assert share.others[0] == "model.layers.*.mlp.gate.weight"
    quantize_folder(tmp_path / "model", tmp_path / "small", "nf4", 16, progress=False)
    assert folder_in_4_bits(tmp_path / "small") == share


def test_at_most_three_names():
    assert str(Share(1, 2, ("a", "b", "c", "d"))).endswith("; the largest others: a, b, c and 1 more")
