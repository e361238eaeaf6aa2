"""Measure what of an adapter's change survives in 4 bits, layer by layer, if the change were larger or smaller.

In: a model from `load` with a trained adapter, and factors for its change. Out: a Survival: for each factor the report
of parity.py, as a merge of the adapter times this factor into 4 bits would give it.

A layer is requantised in memory, computes, and gets its own weight and strength back, also after an error. One layer at
a time is in float32; a second packed copy of all layers is in memory.
Not here: a merge that is kept (merge.py), which is a factor of 1.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from qlora_lab.adapters.adapter import method_of
from qlora_lab.adapters.expert_lora import LoRAStack
from qlora_lab.adapters.lora import lora_layers
from qlora_lab.adapters.lora_linear import LoRALinear
from qlora_lab.export.merged_weight import merged_in_4_bits
from qlora_lab.export.parity import Answers, Change, Parity, compare, log_probabilities, prompt_tokens
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.quant.numbers import check_number
from qlora_lab.quant.quantize import dequantize

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FACTORS = (1, 2, 4, 8, 16, 32, 64, 128)  # a short training changes weights by 0.2 %, and codes move from 5 % on


@dataclass(frozen=True)
class Survival:
    """What is left of an adapter's change after a merge into 4 bits. Layers are in the model's order."""

    sizes: dict[str, float]  # layer -> norm of its change / norm of its 4-bit weight, for a factor of 1
    reports: dict[float, Parity]  # factor -> the report of a merge

    @property
    def size(self) -> float:
        """The mean over layers of the size of the change."""
        return fmean(self.sizes.values())


def survival(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    factors: Sequence[float] = FACTORS,
    *,
    progress: bool = True,
) -> Survival:
    """Merge the adapter of `model`, times each of `factors`, into 4 bits in memory, and compare. The model stays as is.

    Raises ValueError for a model without an adapter, an adapted layer that is not in 4 bits, a factor that is not a
    number above 0, and a change so large that its sum with a weight is not finite.
    """
    layers = lora_layers(model)
    if method_of(model) == "dora":
        raise ValueError("DoRA's magnitudes do not scale with a factor: measure LoRA, or merge and read the report")
    for path, layer in layers.items():
        if isinstance(layer, LoRAStack):
            raise ValueError(
                f"{path} holds experts, and only a merge tells how much of them survives: merge, and read the report"
            )
        if not isinstance(layer.base, Linear4bit):
            raise ValueError(f"{path} is not in 4 bits, so nothing is requantised: load the model with a codebook")
    if not factors:
        raise ValueError("no factor is given: give some, such as (1, 2, 4)")
    for factor in factors:
        check_number("factor", factor, lambda value: 0 < value <= 1e6, "a number above 0 and at most 1,000,000")
    ids = prompt_tokens(model, tokenizer)
    with torch.no_grad():
        sizes = {path: _size(layer) for path, layer in layers.items()}
        with _restored(layers):
            _scale(layers, 0)
            base = log_probabilities(model, ids)
        reports = {}
        for factor in tqdm(factors, "merging", unit="size", disable=not progress):
            with _restored(layers):
                _scale(layers, factor)
                adapter = log_probabilities(model, ids)
                changes = {path: _merge(layer, path) for path, layer in layers.items()}
                answers = Answers(ids, base, adapter, log_probabilities(model, ids))
            reports[factor] = compare(answers, "requantised", changes)
    return Survival(sizes, reports)


@contextmanager
def _restored(layers: dict[str, LoRALinear]) -> Iterator[None]:
    """Give each layer its weight and its scaling back at the end."""
    own = [(layer, layer.base.weight, layer.scaling) for layer in layers.values()]
    try:
        yield
    finally:
        for layer, weight, scaling in own:
            layer.base.weight = weight
            layer.scaling = scaling


def _scale(layers: dict[str, LoRALinear], factor: float) -> None:
    for layer in layers.values():
        layer.scaling *= factor


def change_of(layer: LoRALinear) -> torch.Tensor:
    """Return what the adapter of `layer` adds to its weight: (out_features, in_features) float32, on the CPU."""
    return layer.change(torch.empty(0, dtype=torch.float32)).detach()  # on the CPU, as this is


def _size(layer: LoRALinear) -> float:
    return (change_of(layer).norm() / dequantize(layer.base.weight, torch.float32).norm()).item()


def _merge(layer: LoRALinear, path: str) -> Change:
    """Give `layer` the requantised weight, and nothing beside it. Returns what became of the change."""
    base = layer.base.weight
    again, change = merged_in_4_bits(base.to("cpu"), lambda *_: change_of(layer), path)
    layer.base.weight = again.to(base.device)
    layer.scaling = 0.0
    return change
