"""What logits depend on: a causal model's on what came before, whatever the dtype; on what is masked, they do not."""

import inspect

import pytest
import torch

from qlora_lab.model.token_dependence import reach, reads_padding
from tests.model.families import FAMILIES, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
ROW = list(range(2, 10))
EARLY, LATE = slice(0, 4), slice(4, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["Llama", "CTRL", "Mamba"])  # CTRL scales its embeddings in place
def test_a_token_is_read_by_those_behind_it(family, dtype):
    model = tiny(family, dtype)
    batch = {"input_ids": torch.tensor([ROW])}
    logits, found = reach(model, batch, [(LATE, EARLY), (EARLY, LATE), (LATE, LATE)])
    assert found == [True, False, True]
    with torch.no_grad():
        assert torch.equal(logits, model(**batch, use_cache=False).logits[0].float())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_reads_padding_where_its_logits_differ(family):
    """On the left, as before answers, and masked: by transformers alone, filled and not."""
    model = tiny(family)
    ids, mask = torch.tensor([[5, 5, 5, *ROW]]), torch.tensor([[0] * 3 + [1] * 8])
    positions = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        positions = {"position_ids": torch.tensor([[0, 0, 0, *range(8)]])}  # as generate counts them
    with torch.no_grad():
        filled = model(input_ids=ids, attention_mask=mask, use_cache=False, **positions).logits[0, 3:]
        alone = model(input_ids=ids[:, 3:], use_cache=False).logits[0]
    differs = (filled - alone).norm() > 1e-2 * alone.norm()
    assert reads_padding(model, ROW, fill=5) == differs == (family in ("RecurrentGemma", "Rwkv"))


def test_nothing_is_left_behind(tiny_llama):
    tiny_llama.train()
    tiny_llama.model.norm.eval()
    state = torch.get_rng_state()
    reach(tiny_llama, {"input_ids": torch.tensor([ROW])}, [(LATE, EARLY)])
    assert tiny_llama.training and not tiny_llama.model.norm.training and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in tiny_llama.parameters())
    assert not tiny_llama.model.embed_tokens._forward_hooks
