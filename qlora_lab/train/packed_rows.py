"""Find out, by trying, whether a model keeps the examples of a packed row apart.

In a packed row position_ids restart where an example begins (batches.py). Many models mask attention accordingly; some
use them for positions only, some ignore them, and a recurrent state crosses the border. No list of names says which.
So we try a row, and ask two questions:

1. Do the logits of one example depend on the tokens of the other? They must not, at all (token_dependence.py).
2. Are they the logits of the example alone? Positions that run on across the border would change them. Both are
   rounded, so they may differ by twice `tolerance`, a root mean square: SmolLM2's differ by 0.6 of it in bf16.

Adapters may still be zero, because it is the base that leaks. The model does not change.
"""

import inspect

import torch
from torch import nn

from qlora_lab.data.batches import collate_rows
from qlora_lab.data.dataset import Encoded
from qlora_lab.model.modes import measuring
from qlora_lab.model.token_dependence import TRIED, reach, row_logits
from qlora_lab.train.rounding import tolerance


def check_packing(model: nn.Module, encoded: list[Encoded], capacity: int) -> None:
    """Raise ValueError if rows of `capacity` tokens would hold several examples, and the model mixes them.

    Examples with pictures are refused: how a family counts the places of their patches in a shared row is its own.
    """
    if any(example.pictures for example in encoded):
        raise ValueError("examples with pictures cannot be packed: leave out packing (--packing)")
    shortest = sorted(encoded, key=lambda example: len(example.input_ids))[:2]  # if these do not fit, no two do
    share_a_row = len(shortest) == 2 and sum(len(example.input_ids) for example in shortest) <= capacity
    if share_a_row and (fault := packing_fault(model, *shortest)):
        raise ValueError(f"{type(model).__name__} cannot train on packed rows: {fault}; leave out packing (--packing)")


def packing_fault(model: nn.Module, first: Encoded, second: Encoded) -> str | None:
    """What goes wrong when `first` and `second` share a row, in words; None if nothing does.

    Only their first TRIED tokens share it.
    """
    if not _takes_positions(model):
        return "it takes no position_ids, which say where an example begins"
    first, second = (Encoded(e.input_ids[:TRIED], e.labels[:TRIED]) for e in (first, second))
    border = len(first.input_ids)
    before = slice(None, border)
    behind = slice(border, None)
    packed, reads = reach(model, collate_rows([[first, second]], pad_id=0), [(behind, before), (before, behind)])
    if any(reads):
        return "an example reads its neighbour in the row"
    with measuring(model):
        alone = [row_logits(model, collate_rows([[example]], pad_id=0)) for example in (first, second)]
    difference = max(_difference(packed[before], alone[0]), _difference(packed[behind], alone[1]))
    allowed = 2 * tolerance(model)  # a root mean square, so twice it is rarely reached
    if difference <= allowed:
        return None
    return f"in a row, an example's logits differ by {difference:.1e} from its own alone, rounding by {allowed:.1e}"


def _takes_positions(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(p.name == "position_ids" or p.kind is p.VAR_KEYWORD for p in parameters)


def _difference(packed: torch.Tensor, alone: torch.Tensor) -> float:
    """The norm of the difference of two (tokens, vocabulary), relative to the second. Softmax sees no constant."""
    packed, alone = (logits - logits.mean(-1, keepdim=True) for logits in (packed, alone))
    return ((packed - alone).norm() / alone.norm()).item()
