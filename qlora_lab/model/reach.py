"""Which tokens a model's logits depend on, found by trying: gradients by the embeddings, exact in any dtype.

In: a model and a batch of one row. Out: its logits, and whether those at some places depend on the tokens at others.
A masked weight of attention is exactly 0, and so is the gradient through it. No tolerance is therefore needed to tell
what is read from what is not, and no dependence hides in rounding. Nothing is changed in the model.

Source: the 24 families of tests/model/families.py. 12 of them read their neighbour in a packed row (packed_rows.py),
and two, RWKV and RecurrentGemma, read what fills a row on its left (measure/held_out.py).
"""

import inspect

import torch
from torch import nn

from qlora_lab.data.dataset import to_device
from qlora_lab.model.modes import mode, own_draws

TRIED = 16  # tokens of an example: a model that reads beyond its own does so within them
FILLED = 3  # tokens that fill the tried row on its left
Places = tuple[slice, slice]  # of logits; of tokens that they may depend on


def row_logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(tokens, vocabulary) float32, of a batch of one row."""
    inputs = {name: tensor for name, tensor in to_device(batch, model).items() if name != "labels"}
    return model(**inputs, use_cache=False).logits[0].float()


def reach(model: nn.Module, batch: dict[str, torch.Tensor], places: list[Places]) -> tuple[torch.Tensor, list[bool]]:
    """(tokens, vocabulary) of a batch of one row; for each of `places`, whether its logits depend on its tokens."""
    embedded = []

    def watch(module, inputs, output):
        embedded.append(output.detach().requires_grad_())
        return embedded[0].clone()  # which a model may scale in place

    hook = model.get_input_embeddings().register_forward_hook(watch)
    try:
        with mode(model, training=False), own_draws(model), torch.enable_grad():
            logits = row_logits(model, batch)
    finally:
        hook.remove()
    # any sum will do whose parts do not cancel; a small one, which float16 can hold
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)) / logits.shape[1] ** 0.5
    weighted, found = logits * weights.to(logits.device), []
    for read, by in places:
        (gradient,) = torch.autograd.grad(weighted[read].sum(), embedded, retain_graph=True)  # (1, tokens, hidden)
        found.append(bool(gradient[0, by].nan_to_num(0.0).any()))  # not a number: float16 overflowed, and tells nothing
    return logits.detach(), found


def reads_padding(model: nn.Module, row: list[int], fill: int) -> bool:
    """Whether the model reads what fills a row on its left, although it is masked, as a recurrent state may.

    The first TRIED tokens of the row are tried, with positions as transformers' `generate` counts them.
    """
    ids = torch.tensor([[fill] * FILLED + row[:TRIED]])
    masked = torch.ones_like(ids)
    masked[:, :FILLED] = 0
    batch = {"input_ids": ids, "attention_mask": masked}
    if "position_ids" in inspect.signature(model.forward).parameters:
        batch["position_ids"] = (masked.cumsum(-1) - 1).clamp(min=0)
    own, filled = slice(FILLED, None), slice(None, FILLED)
    return reach(model, batch, [(own, filled)])[1][0]
