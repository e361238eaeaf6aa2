"""Houlsby adapters: a bottleneck after each sublayer, with its own skip connection.

    y = base(x);   out = y + gelu(y D^T + b) U^T + c

D: (size, d), U: (d, size), b: (size,), c: (d,). base is the last linear layer of attention and that of the feed-forward
part, so the adapter acts before the sublayer's own sum with the residual stream.
Source: Houlsby et al. (arXiv 1902.00751) section 2.1, with 2 m d + d + m parameters for an adapter; weights start as in
the authors' code, a Gaussian of 1e-3 cut at two deviations, so that an adapter is nearly the identity.

The bottleneck is not linear, so it cannot be merged into a weight: each sublayer pays for it in every answer.
"""

import torch
from torch import nn
from torch.nn.functional import gelu, linear

from qlora_lab.adapters.adapter import Adapter
from qlora_lab.adapters.targets import linear_layers
from qlora_lab.quant.numbers import check_seed, check_whole

DEVIATION = 1e-3
# Last linear layers of attention and of the feed-forward part: LLaMA's and its relatives', GPT-NeoX's, OPT's.
LAST = ({"o_proj", "down_proj"}, {"dense", "dense_4h_to_h"}, {"out_proj", "fc2"})


class HoulsbyLinear(Adapter):
    """`base`, a linear layer, and a bottleneck of `size` on its output."""

    method = "houlsby"

    def __init__(self, base: nn.Module, size: int, generator: torch.Generator):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(_near_zero(size, base.out_features, generator).to(base.weight.device))
        # a bias starts at zero, so that gelu starts where its slope is one half
        self.down_bias = nn.Parameter(torch.zeros(size, dtype=torch.float32, device=base.weight.device))
        self.up = nn.Parameter(_near_zero(base.out_features, size, generator).to(base.weight.device))
        self.up_bias = nn.Parameter(torch.zeros(base.out_features, dtype=torch.float32, device=base.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)  # (..., d)
        inner = gelu(linear(y, self.down.to(y.dtype), self.down_bias.to(y.dtype)))  # (..., size)
        return y + linear(inner, self.up.to(y.dtype), self.up_bias.to(y.dtype))  # (..., d)

    def settings(self) -> dict[str, int]:
        return {"size": len(self.down)}


def houlsby(model: nn.Module, size: int = 64, *, seed: int = 0) -> dict[str, HoulsbyLinear]:
    """Make a bottleneck of `size` for the end of each attention and feed-forward part of `model`.

    Raises ValueError for a model whose sublayers end in layers of other names.
    """
    check_whole("size", size)
    check_seed(seed)
    if any("experts" in path.split(".") for path, _ in model.named_modules()):
        why = "so its feed-forward part has no single last layer"
        raise ValueError(f"{type(model).__name__} routes tokens to experts, {why}: use lora")
    layers = linear_layers(model)
    present = {path.split(".")[-1] for path in layers}
    names = next((names for names in LAST if names <= present), None)
    if names is None:
        known = ", ".join("/".join(sorted(names)) for names in LAST)
        raise ValueError(f"houlsby knows sublayers that end in {known}, not those of {type(model).__name__}: use lora")
    generator = torch.Generator().manual_seed(seed)
    chosen = {path: layer for path, layer in layers.items() if path.split(".")[-1] in names}
    return {path: HoulsbyLinear(layer, size, generator) for path, layer in chosen.items()}


def _near_zero(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    weight = torch.empty(rows, columns, dtype=torch.float32)
    return nn.init.trunc_normal_(weight, std=DEVIATION, a=-2 * DEVIATION, b=2 * DEVIATION, generator=generator)
