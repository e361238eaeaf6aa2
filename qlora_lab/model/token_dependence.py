"""Find out which tokens a model's logits depend on, by gradients with respect to embeddings: exact in any dtype.

A masked attention weight is exactly 0, and so is the gradient through it. So no tolerance is needed to tell what is
read from what is not, and no dependence hides in rounding. The model is not changed.

docs/families.md says which families read their neighbour in a packed row (train/packed_rows.py). Of the models of
tests/model/families.py, RWKV and RecurrentGemma read left padding (measure/held_out.py).
"""

import inspect

import torch
from torch import nn

from qlora_lab.data.dataset import to_device
from qlora_lab.model.modes import mode, own_draws

TRIED = 16  # tokens of an example: enough to catch a model that reads beyond its own
FILLED = 3  # tokens of padding on the left of the tried row
Places = tuple[slice, slice]  # of logits, and of tokens that they may depend on


def row_logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits of a batch of one row, (tokens, vocabulary) float32."""
    inputs = {name: tensor for name, tensor in to_device(batch, model).items() if name != "labels"}
    return model(**inputs, use_cache=False).logits[0].float()


def reach(model: nn.Module, batch: dict[str, torch.Tensor], places: list[Places]) -> tuple[torch.Tensor, list[bool]]:
    """Return the logits, (tokens, vocabulary), and for each of `places` whether its logits depend on its tokens."""
    embedded = []  # filled by the hook: (1, tokens, hidden)

    def watch(module, inputs, output):
        embedded.append(output.detach().requires_grad_())
        return embedded[0].clone()  # a model may scale it in place

    hook = model.get_input_embeddings().register_forward_hook(watch)
    try:
        with mode(model, training=False), own_draws(model), torch.enable_grad():
            logits = row_logits(model, batch)
    finally:
        hook.remove()  # the model is as before
    # Random weights, so that parts of the sum do not cancel; small ones, so that float16 can hold it.
    weights = torch.randn(logits.shape, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    weights /= logits.shape[1] ** 0.5
    weighted = logits * weights.to(logits.device)
    depends = []
    for outputs, inputs in places:
        (gradient,) = torch.autograd.grad(weighted[outputs].sum(), embedded, retain_graph=True)  # (1, tokens, hidden)
        depends.append(bool(gradient[0, inputs].nan_to_num(0.0).any()))  # NaN is a float16 overflow: it tells nothing
    return logits.detach(), depends


def reads_padding(model: nn.Module, row: list[int], fill: int) -> bool:
    """Tell whether the model reads masked padding on the left of a row, as a recurrent state may.

    Tries the first TRIED tokens of the row, with positions as transformers' `generate` counts them.
    """
    ids = torch.tensor([[fill] * FILLED + row[:TRIED]], dtype=torch.int64)  # (1, tokens)
    masked = torch.ones_like(ids)
    masked[:, :FILLED] = 0  # 0: not to be read
    batch = {"input_ids": ids, "attention_mask": masked}
    if "position_ids" in inspect.signature(model.forward).parameters:
        batch["position_ids"] = (masked.cumsum(-1) - 1).clamp(min=0)
    own = slice(FILLED, None)
    padding = slice(None, FILLED)
    return reach(model, batch, [(own, padding)])[1][0]
