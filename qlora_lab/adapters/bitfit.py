"""BitFit: train the biases and nothing else.

    y = base(x) + delta,   delta: (out,), zero at first

Source: Ben Zaken et al. (arXiv 2106.10199) section 3. A bias and its change are one term, so learning `delta` beside a
frozen bias is the same; the bias keeps its bits, and the change is kept in float32.

LLaMA and most of its relatives have no biases. `zero_bias` adds a bias of zero to each of their linear layers; that is
another method than BitFit, under a name of its own.
"""

import torch
from torch import nn

from qlora_lab.adapters.adapter import Adapter
from qlora_lab.model.layer_kinds import out_and_in
from qlora_lab.model.linear4bit import is_linear, left_alone


class BiasChange(Adapter):
    """`base`, a layer whose output ends in d features, and a learned change of its bias."""

    method = "bitfit"

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base.requires_grad_(False)
        width = out_and_in(base)[0] if is_linear(base) else base.weight.shape[-1]
        # (d,): float32, although the bias that it stands beside may have 16 bits
        self.delta = nn.Parameter(torch.zeros(width, dtype=torch.float32, device=base.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)  # (..., d), with the frozen bias
        return y + self.delta.to(y.dtype)

    def settings(self) -> dict:
        return {}


class ZeroBias(BiasChange):
    """The same beside a layer without a bias."""

    method = "zero_bias"


def bitfit(model: nn.Module) -> dict[str, BiasChange]:
    """Make a change for every bias of `model`: those of linear layers and of norms.

    Raises ValueError for a model without biases, or with biases elsewhere.
    """
    with_bias = {path: m for path, m in model.named_modules() if getattr(m, "bias", None) is not None}
    if not with_bias:
        raise ValueError(f"{type(model).__name__} has no biases to train: use zero_bias, which adds some, or lora")
    # anything else that has a bias may use it in another way, such as a convolution
    if others := [path for path, m in with_bias.items() if not (is_linear(m) or isinstance(m, nn.LayerNorm))]:
        kind = type(with_bias[others[0]]).__name__
        raise ValueError(f"bitfit knows biases of linear layers and LayerNorm, not of {kind} at {others[0]}: use lora")
    return {path: BiasChange(layer) for path, layer in with_bias.items()}


def zero_bias(model: nn.Module) -> dict[str, ZeroBias]:
    """Make a bias of zero for every linear layer of `model` but the head and routers.

    Raises ValueError for a model with biases.
    """
    kept = left_alone(model)  # a bias of the head would be a prior over words
    layers = {path: m for path, m in model.named_modules() if is_linear(m) and path not in kept}
    if not layers or any(layer.bias is not None for layer in layers.values()):
        reason = "has biases: use bitfit, which trains those" if layers else "has no linear layer besides its head"
        raise ValueError(f"{type(model).__name__} {reason}")
    return {path: ZeroBias(layer) for path, layer in layers.items()}
