"""Whether a model keeps the examples of a packed row apart, found by trying.

In: a model and two encoded examples. Out: None, or what goes wrong when they share a row.
A packed row says where its examples begin by position_ids that restart (batches.py). Many models mask attention by
them; some read them for positions only, some not at all, and a recurrent state is passed on across the border. No list
of names tells which, so a row is tried, and asked two questions:

1. Do the logits of one example depend on the tokens of the other? They must not, exactly (reach.py).
2. Are they those of the example alone? Positions that run on across the border would change them. Both are rounded, so
   they may differ by twice `tolerance`, which is a root mean square: SmolLM2's differ by 0.6 of it in bf16.

Adapters may be zero, since the base leaks by itself. Nothing is changed in the model.
"""

import inspect

import torch
from torch import nn

from qlora_lab.data.batches import collate_rows
from qlora_lab.data.dataset import Encoded
from qlora_lab.model.modes import measuring
from qlora_lab.model.reach import TRIED, reach, row_logits
from qlora_lab.train.rounding import tolerance


def check_packing(model: nn.Module, encoded: list[Encoded], capacity: int) -> None:
    """Raise ValueError if rows of `capacity` tokens would hold several examples, and the model mixes them."""
    shortest = sorted(encoded, key=lambda example: len(example.input_ids))[:2]
    share_a_row = len(shortest) == 2 and sum(len(example.input_ids) for example in shortest) <= capacity
    if share_a_row and (fault := packing_fault(model, *shortest)):
        raise ValueError(f"{type(model).__name__} cannot train on packed rows: {fault}; leave out packing (--packing)")


def packing_fault(model: nn.Module, first: Encoded, second: Encoded) -> str | None:
    """What goes wrong when `first` and `second` share a row, in words; None if nothing does.

    Their first TRIED tokens are tried.
    """
    if not _takes_positions(model):
        return "it takes no position_ids, which say where an example begins"
    first, second = (Encoded(one.input_ids[:TRIED], one.labels[:TRIED]) for one in (first, second))
    border = len(first.input_ids)
    before, behind = slice(None, border), slice(border, None)
    packed, reads = reach(model, collate_rows([[first, second]], pad_id=0), [(behind, before), (before, behind)])
    if any(reads):
        return "an example reads its neighbour in the row"
    with measuring(model):
        alone = [row_logits(model, collate_rows([[example]], pad_id=0)) for example in (first, second)]
    difference = max(_difference(packed[before], alone[0]), _difference(packed[behind], alone[1]))
    allowed = 2 * tolerance(model)
    if difference <= allowed:
        return None
    return f"in a row, an example's logits differ by {difference:.1e} from its own alone, rounding by {allowed:.1e}"


def _takes_positions(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(p.name == "position_ids" or p.kind is p.VAR_KEYWORD for p in parameters)


def _difference(packed: torch.Tensor, alone: torch.Tensor) -> float:
    """Of two (tokens, vocabulary), in norm, relative to the second. A constant is taken off: no softmax sees it."""
    packed, alone = (logits - logits.mean(-1, keepdim=True) for logits in (packed, alone))
    return ((packed - alone).norm() / alone.norm()).item()
