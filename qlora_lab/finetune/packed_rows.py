"""Whether a model keeps the examples of a packed row apart, found by trying.

In: a model and two encoded examples. Out: None, or what goes wrong when they share a row.
A packed row says where its examples begin by position_ids that restart (batches.py). Many models mask attention by
them; some read them for positions only, some not at all, and a recurrent state is passed on across the border. No list
of names tells which, so a row is tried, and asked two questions:

1. Do the logits of one example depend on the tokens of the other? Their gradient by the other's embeddings is exactly
   zero if not, in any dtype: a masked weight of attention is exactly 0. So no leak can hide in rounding.
2. Are they what the example gets alone? Positions that were counted on would change them. Both are rounded, so they
   may differ by `tolerance`, which is made for a forward and a backward pass; this is a forward pass alone.

Adapters may be zero: the base leaks already. Nothing is changed in the model.
"""

import inspect

import torch
from torch import nn

from qlora_lab.finetune.batches import collate_rows
from qlora_lab.finetune.data import Encoded, to_device
from qlora_lab.finetune.modes import mode, own_draws
from qlora_lab.finetune.rounding import tolerance

TRIED = 16  # tokens of an example: a leak shows in the first one behind the border


def check_packing(model: nn.Module, encoded: list[Encoded], capacity: int) -> None:
    """Raise ValueError if rows of `capacity` tokens would hold several examples, and the model mixes them."""
    shortest = sorted(encoded, key=lambda example: len(example.input_ids))[:2]
    share_a_row = len(shortest) == 2 and sum(len(example.input_ids) for example in shortest) <= capacity
    if share_a_row and (fault := packing_fault(model, *shortest)):
        raise ValueError(f"{type(model).__name__} cannot train on packed rows: {fault}; leave packing off (--packing)")


def packing_fault(model: nn.Module, first: Encoded, second: Encoded) -> str | None:
    """What goes wrong when `first` and `second` share a row, in words; None if nothing does.

    Their first TRIED tokens are tried.
    """
    if not _takes_positions(model):
        return "it takes no position_ids, which say where an example begins"
    first, second = (Encoded(one.input_ids[:TRIED], one.labels[:TRIED]) for one in (first, second))
    border = len(first.input_ids)
    with mode(model, training=False), own_draws(model):
        packed, reads = _packed_logits(model, first, second)
        if reads:
            return "an example reads its neighbour in the row"
        with torch.no_grad():
            alone = [_logits(model, [example]) for example in (first, second)]
    difference = max(_difference(packed[:border], alone[0]), _difference(packed[border:], alone[1]))
    allowed = tolerance(model)
    if difference <= allowed:
        return None
    return f"in a row an example's logits differ by {difference:.1e} from those of it alone, rounding by {allowed:.1e}"


def _takes_positions(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(p.name == "position_ids" or p.kind is p.VAR_KEYWORD for p in parameters)


def _logits(model: nn.Module, row: list[Encoded]) -> torch.Tensor:
    """(tokens, vocabulary) float32, of one row."""
    batch = to_device(collate_rows([row], pad_id=0), model)
    del batch["labels"]
    return model(**batch, use_cache=False).logits[0].float()


def _packed_logits(model: nn.Module, first: Encoded, second: Encoded) -> tuple[torch.Tensor, bool]:
    """(tokens, vocabulary) of both in a row; whether those of one depend on the other's tokens."""
    embedded = []

    def watch(module, inputs, output):
        embedded.append(output.detach().requires_grad_())
        return embedded[0].clone()  # which a model may scale in place

    hook = model.get_input_embeddings().register_forward_hook(watch)
    try:
        with torch.enable_grad():
            logits = _logits(model, [first, second])
    finally:
        hook.remove()
    border = len(first.input_ids)
    # any sum will do whose parts do not cancel; a small one, which float16 can hold
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)) / logits.shape[1] ** 0.5
    weighted = logits * weights.to(logits.device)
    (by_first,) = torch.autograd.grad(weighted[border:].sum(), embedded, retain_graph=True)
    (by_second,) = torch.autograd.grad(weighted[:border].sum(), embedded)
    foreign = torch.cat([by_first[0, :border], by_second[0, border:]])  # (tokens, hidden)
    return logits.detach(), bool(foreign.nan_to_num(0.0).any())  # not a number: float16 overflowed, so nothing is known


def _difference(packed: torch.Tensor, alone: torch.Tensor) -> float:
    """Of two (tokens, vocabulary), in norm, relative to the second. A constant is taken off: no softmax sees it."""
    packed, alone = (logits - logits.mean(-1, keepdim=True) for logits in (packed, alone))
    return ((packed - alone).norm() / alone.norm()).item()
