"""LoftQ: LoRA that starts as what quantisation lost, so that the adapted 4-bit model begins nearer to the original.

    scaling B A = the best product of rank r for W - W4

W: the original weight, W4: the decoded one. PEFT's own leaves out the scaling, so it makes up for the loss only where
alpha = r.
Source: Li et al. (arXiv 2310.08659), algorithm 1 with one round. More rounds would quantise the base anew: it would be
a model of its own, and no adapter file would fit the original. After one round the adapter is plain LoRA.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from qlora_lab.adapters.lora import make, strengths_of
from qlora_lab.adapters.lora_linear import LoRALinear
from qlora_lab.adapters.pissa import start
from qlora_lab.model.empty_model import empty_model, stored_options
from qlora_lab.model.fetch import known_name, resolve
from qlora_lab.model.layer_kinds import kept_shape, turned
from qlora_lab.model.linear4bit import Linear4bit, decoded
from qlora_lab.model.stored import Stored, stored_tensors


def loftq(
    model: nn.Module,
    r: int | Mapping[str, int] = 16,
    alpha: float = 16,
    dropout: float = 0.0,
    source: str | Path | None = None,
    *,
    progress: bool = True,
) -> dict[str, LoRALinear]:
    """Make what add_lora makes for every layer in 4 bits, with A and B from what quantisation lost there.

    source: what the original weights are loaded from; None: what the model is named. Raises what add_lora raises, and
    ValueError for a model without a layer in 4 bits, or a source that is in 4 bits or does not fit the model.
    """
    packed = [path for path, layer in model.named_modules() if isinstance(layer, Linear4bit)]
    if not packed:
        raise ValueError("no layer of this model is in 4 bits, so nothing was lost: use lora, or load it in 4 bits")
    strengths = strengths_of(model, r, alpha, packed)
    originals = _originals(model, packed, known_name(model.name_or_path if source is None else source), progress)
    made = make(LoRALinear, model, strengths, dropout)
    generator = torch.Generator().manual_seed(0)  # for the decomposition
    for path, layer in tqdm(made.items(), "decomposing", disable=not progress, delay=2, unit="layer"):
        weight = turned(model, f"{path}.weight", originals[path].read().to(layer.lora_A.device, torch.float32))
        start(layer, weight - decoded(layer.base), generator)
    return made


def _originals(model: nn.Module, paths: list[str], source: str | Path, progress: bool) -> dict[str, Stored]:
    """Return path -> the original weight of each layer, once all are known to fit."""
    folder = resolve(source, progress=progress)
    if stored_options(folder):
        raise ValueError(f"{folder} is in 4 bits already: name the original that it was made from as the source")
    stored = stored_tensors(empty_model(folder, torch.bfloat16), folder)
    for path in paths:
        name = f"{path}.weight"
        shape = tuple(stored[name].shape) if name in stored else "missing"
        needed = tuple(kept_shape(model.get_submodule(path)))
        if shape != needed:
            raise ValueError(f"{folder} has {name} as {shape}, this model as {needed}: name its original")
    return {path: stored[f"{path}.weight"] for path in paths}
