"""Every family of docs/families.md loads as transformers loads it, and the page is what the code sees."""

import shutil
from itertools import chain

import pytest
import torch

from tools.families import (
    BLOCK,
    FAMILIES,
    PAGE,
    Family,
    is_decoded,
    left,
    logits,
    ours,
    page,
    quiet,
    readers,
    save,
    theirs,
)

FAST = {"Llama", "Gemma 3, text", "BioGPT", "CTRL", "GPT-J", "GPT-NeoX", "GPTBigCode", "RecurrentGemma", "Mixtral"}


def marked(family: Family):
    return pytest.param(family, id=family.name, marks=[] if family.name in FAST else pytest.mark.slow)


def tensors(model):
    return dict(chain(model.named_parameters(), model.named_buffers()))


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", [marked(family) for family in FAMILIES if not family.refused])
def test_a_family_loads_as_transformers_loads_it(family, tmp_path):
    with quiet():
        save(family, tmp_path)
        want, found, again = theirs(tmp_path), *(ours(tmp_path, codebook=None) for _ in range(2))
    assert tensors(found).keys() == tensors(want).keys()
    for name, tensor in tensors(want).items():
        assert torch.equal(tensors(found)[name], tensor) and torch.equal(tensors(again)[name], tensor), name
    # the numbers are the same; where they lie in memory may decide in which order a product adds them
    torch.testing.assert_close(logits(found), logits(want), rtol=0, atol=1e-5)


LEFT = {
    "Llama": "norms",
    "OLMo": "nothing",
    "Qwen2-MoE": "biases, gates of shared experts, norms, router",
    "GPT-OSS": "biases, norms, other vectors, router",  # its attention sinks; biases of experts are matrices
    "Mamba": "biases, convolutions, norms, other vectors, used directly: A_log dt_proj out_proj x_proj",
}


@pytest.mark.slow  # it quantises, which the fast tests of this file do not (tools/stages.py)
@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_is_told_by_the_model(name, tmp_path):
    (family,) = (family for family in FAMILIES if family.name == name)
    with quiet():
        save(family, tmp_path)
        assert left(ours(tmp_path, block_size=BLOCK)) == LEFT[name]


@pytest.mark.slow  # the same
@pytest.mark.usefixtures("one_thread")
def test_another_model_is_told_from_the_decoded_one(tmp_path):
    (family,) = (family for family in FAMILIES if family.name == "Mixtral")
    folder = tmp_path / "model"
    with quiet():
        save(family, folder)
        model = ours(folder, block_size=BLOCK)
        assert is_decoded(model, folder) and readers(model, folder) == "here"
        model.model.norm.weight.data *= 1.0001  # logits change by 1e-4, five times what rounding may do
        assert not is_decoded(model, folder)
        shutil.rmtree(tmp_path / "packed")
        assert readers(model, folder) == "no: another model here"


@pytest.mark.slow  # every family is trained, and read by PEFT
@pytest.mark.usefixtures("one_thread")
def test_the_page_is_what_the_code_sees():
    assert PAGE.read_text("utf-8") == page(), "renew it: python -m tools.families"
