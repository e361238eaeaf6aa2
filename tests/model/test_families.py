"""Every family of docs/families.md loads as transformers loads it, and the page is what the code sees."""

from itertools import chain

import pytest
import torch

from tools.families import FAMILIES, PAGE, Family, logits, ours, page, quiet, save, theirs

FAST = {"Llama", "Gemma 3, text", "BioGPT", "CTRL", "GPT-J", "GPT-NeoX", "GPTBigCode", "RecurrentGemma", "Mixtral"}


def marked(family: Family):
    return pytest.param(family, id=family.name, marks=[] if family.name in FAST else pytest.mark.slow)


def tensors(model):
    return dict(chain(model.named_parameters(), model.named_buffers()))


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


@pytest.mark.slow  # every family is trained, and read by PEFT
@pytest.mark.usefixtures("one_thread")
def test_the_page_is_what_the_code_sees():
    assert PAGE.read_text("utf-8") == page(), "renew it: python -m tools.families"
