"""What a merge makes of one weight: a matrix, or a stack of experts, plus what an adapter learned beside it.

In: the base, (out_features, in_features) or (experts, out_features, in_features), as floats or packed, and what gives
the change of some of its rows. Out: the tensors that a file holds, and how much of the change arrived in them.
All sums are float32; experts come one at a time, so a stack is never whole in float32.
Not here: which weights, and their files (merge.py).
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from qlora_lab.export.layerwise import as_float, panels
from qlora_lab.export.parity import Alignment, Change, layer_change
from qlora_lab.model.packed_module import packed_tensors_of
from qlora_lab.quant.codebook import CUSTOM
from qlora_lab.quant.finite import first_not_finite
from qlora_lab.quant.quantize import QuantizedTensor, quantize
from qlora_lab.quant.stack import Quantized, QuantizedStack, stacked

# From some rows of a weight, (rows, in_features) float32, and which they are, to what an adapter adds to them. In a
# stack the number of the expert comes third.
Learned = Callable[..., torch.Tensor]


def merged_in_16_bits(
    base: torch.Tensor | Quantized, learned_of: Learned, dtype: torch.dtype, name: str
) -> tuple[dict[str, torch.Tensor], Change]:
    """Return name -> `base` with what was learned, in `dtype`, and what became of the change.

    Raises ValueError, with the name, for a sum that is not finite.
    """
    value = torch.empty(base.shape, dtype=dtype)
    change = Alignment()
    for which, matrix, out in _matrices(base, value):
        for rows, before in panels(matrix):
            learned = learned_of(before, rows, *which)
            out[rows] = before + learned
            change.add(out[rows].float().sub_(before), learned)  # what was really added, and what was to be
    return {name: finite(value, name)}, Change(change.cosine(), arrived=change.arrived())


def merged_stack_in_4_bits(base: QuantizedStack, learned_of: Learned, name: str) -> tuple[QuantizedStack, Change]:
    """Return `base`, on the CPU, with what was learned, each expert in 4 bits again, and what became of the change."""
    members = []
    change = Alignment()
    changed = 0.0
    for expert, member in enumerate(base.members):
        again, added, learned = _again(member, lambda *rows, e=expert: learned_of(*rows, e), f"{name}[{expert}]")
        members.append(again)
        change.add(added, learned)
        changed += _changed(again, member) / len(base)
    return stacked(members), Change(change.cosine(), changed, change.arrived())


def merged_in_4_bits(base: QuantizedTensor, learned_of: Learned, name: str) -> tuple[QuantizedTensor, Change]:
    """Return `base`, on the CPU, with what was learned, in 4 bits again, and what became of the change."""
    again, added, learned = _again(base, learned_of, name)
    return again, layer_change(added, learned, _changed(again, base))


def _again(base: QuantizedTensor, learned_of: Learned, name: str) -> tuple[QuantizedTensor, torch.Tensor, torch.Tensor]:
    """Return the new weight, what was really added, and what was to be."""
    before = as_float(base)
    learned = learned_of(before, slice(None))
    again = requantised(before + learned, base, name)
    return again, as_float(again).sub_(before), learned


def _changed(again: QuantizedTensor, base: QuantizedTensor) -> float:
    return (again.codes != base.codes).float().mean().item()


def requantised(merged: torch.Tensor, base: QuantizedTensor, name: str) -> QuantizedTensor:
    """Quantise `merged`, float32 of the base's shape, with the settings of the base. name: what errors call it."""
    codebook = base.levels if base.codebook == CUSTOM else base.codebook
    again = quantize(merged, codebook, base.block_size, base.double_quant, name=name)
    return replace(again, dtype=base.dtype)  # of the original, which bitsandbytes decodes to


def with_learned(base: torch.Tensor | Quantized, learned_of: Learned) -> torch.Tensor:
    """Return `base` in float32 with what was learned."""
    value = as_float(base).clone()  # it may be a view of a file
    for which, matrix, _ in _matrices(value, value):
        matrix += learned_of(matrix, slice(None), *which)
    return value


def _matrices(
    base: torch.Tensor | Quantized, out: torch.Tensor
) -> list[tuple[tuple[int, ...], torch.Tensor, torch.Tensor]]:
    """Return (which, matrix, its place in `out`) for each matrix; which: (expert,) in a stack, else ()."""
    if len(base.shape) == 2:
        return [((), base, out)]
    return [((expert,), base[expert], out[expert]) for expert in range(len(base))]


def packed(q: Quantized, name: str) -> dict[str, torch.Tensor]:
    """All weights share a table, but safetensors stores no tensor under two names: each gets a copy of all."""
    return {key: tensor.clone() for key, tensor in packed_tensors_of(q, name).items()}


def finite(value: torch.Tensor, name: str) -> torch.Tensor:
    """Return `value`. Raises ValueError, with the name, for NaN and infinity."""
    if value.is_floating_point() and (fault := first_not_finite(value)):
        raise ValueError(f"{name} holds {fault} after the merge in {value.dtype}: use the adapter of an earlier step")
    return value
