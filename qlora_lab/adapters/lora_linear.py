"""LoRA: a frozen linear layer plus a trainable product of two thin matrices.

    y = base(x) + scaling * dropout(x) A^T B^T,   scaling = alpha / r

In: x, (..., in_features). Out: y, (..., out_features). lora_A: (r, in_features), lora_B: (out_features, r), float32.
Source: LoRA (arXiv 2106.09685) section 4.1. A and B start as in PEFT and the authors' code: A uniform within
1/sqrt(in_features), B zero, so that the adapted model first equals the base exactly. (The paper says A is Gaussian.)

The two products run in the dtype of x. Beside a Linear4bit on the CPU they run in float32 and are added before the
layer's one rounding (kernels/product.py), unless there is dropout.

Not here: putting it into a model (lora.py); experts (expert_lora.py); its relatives (rslora.py, dora.py, pissa.py,
loftq.py, train/lora_plus.py); files (peft_format.py).
"""

import math
from typing import ClassVar

import torch
from torch import nn

from qlora_lab.adapters.adapter import Adapter
from qlora_lab.adapters.strength import check_strength
from qlora_lab.model.layer_kinds import out_and_in
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.quant.numbers import check_whole


class LoRALinear(Adapter):
    """`base`, an nn.Linear, Linear4bit or Conv1D, with an adapter of rank r beside it. The base is frozen.

    r: at least 1; above min(in_features, out_features) it costs memory and expresses nothing more.
    alpha: strength, above 0; the product is scaled by alpha / r.
    dropout: on the adapter's input in training, 0 to below 1. generator: draws lora_A.
    Raises ValueError outside these ranges.
    """

    method = "lora"
    flags: ClassVar[dict[str, bool]] = {}  # what PEFT's configuration says of a relative

    def __init__(
        self,
        base: nn.Module,
        r: int = 16,
        alpha: float = 16,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        check_whole("r", r)
        self.base = base.requires_grad_(False)
        self.r = r
        self.dropout = nn.Dropout()  # its p comes next
        self.set_strength(alpha, dropout)
        out_features, in_features = out_and_in(base)
        experts = base.weight.shape[:-2]  # () beside a linear layer
        bound = 1 / math.sqrt(in_features)
        # on the CPU: one seed, one A
        A = torch.empty(*experts, r, in_features, dtype=torch.float32)  # (r, in)
        A.uniform_(-bound, bound, generator=generator)
        B = torch.zeros(*experts, out_features, r, dtype=torch.float32, device=base.weight.device)  # (out, r)
        self.lora_A, self.lora_B = nn.Parameter(A.to(base.weight.device)), nn.Parameter(B)

    def set_strength(self, alpha: float, dropout: float) -> None:
        """Set alpha, and thereby scaling = alpha / r, and dropout."""
        check_strength(alpha, dropout)
        self.alpha = alpha
        self.scaling = alpha / self.divisor(self.r)
        self.dropout.p = dropout

    @staticmethod
    def divisor(r: int) -> float:
        # B A is a sum of r terms: dividing by r keeps its size, so a learning rate found at one r serves at another.
        return r

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A, (r, in_features), and B, (out_features, r), of the product beside the base."""
        return self.lora_A, self.lora_B

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        A, B = self.factors()  # lora_A and lora_B
        dropping = self.training and self.dropout.p > 0  # base and adapter then read different x
        exact = A.dtype == B.dtype == torch.float32  # a caller can set .data
        if isinstance(self.base, Linear4bit) and self.base.takes_adapter and exact and not dropping:
            return self.base(x, (A, B, self.scaling))  # the same as below, in one pass over x
        A = A.to(x.dtype)  # (r, in)
        B = B.to(x.dtype)  # (out, r)
        low = self.dropout(x) @ A.t() * self.scaling  # (..., in) @ (in, r) -> (..., r): scaled where it is thinnest
        return self.base(x) + low @ B.t()  # (..., r) @ (r, out) -> (..., out)

    def change(self, weight: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """Return what a merge adds to `weight`, these rows of the base's, (rows, in_features) float32 on any device."""
        A, B = self.factors()
        return (B[rows] @ A).mul_(self.scaling).to(weight.device)  # (rows, r) @ (r, in) -> (rows, in)

    def plain(self) -> "LoRALinear":
        """Return the layer of PEFT's kinds that computes the same, which files hold."""
        return self

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha}"

    def settings(self) -> dict[str, float]:
        return {"r": self.r, "alpha": self.alpha, "dropout": self.dropout.p}
