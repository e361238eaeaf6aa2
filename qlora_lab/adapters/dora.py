"""DoRA: LoRA that turns each row of the weight, and a learned magnitude that gives it its length.

    y = m / ||W + s B A|| * (x W^T + s x A^T B^T) + bias,   s = alpha / r, ||.|| the length of each row

m: (out_features,), first ||W||, so that the adapted model equals the base exactly. The lengths are constants for
backward (section 4.3). W is never decoded for them, because one product of the base with the r rows of A is enough:

    ||W + s B A||_i^2 = ||W_i||^2 + 2 s <B_i, (A W^T)_i> + s^2 B_i (A A^T) B_i^T

It is summed in float64, and loses digits only where an update all but erases a row. Between training steps, A and B do
not change, so the lengths are kept: an answer then costs one product a token, as with LoRA.
Dropout acts as in PEFT: on what the base adds to m / ||.|| - 1 as well.
Source: Liu et al. (arXiv 2402.09353), equation 5; m is named as in PEFT.
"""

from typing import ClassVar

import torch
from torch import nn

from qlora_lab.adapters.lora_linear import LoRALinear
from qlora_lab.model import product_4bit
from qlora_lab.model.linear4bit import Linear4bit, as_matrix, decoded

LEAST = 1e-12  # of ||W_i||^2: a row that is erased has a length of its rounding, and no square root of less than 0


class DoRALinear(LoRALinear):
    method = "dora"
    flags: ClassVar[dict[str, bool]] = {"use_dora": True}

    def __init__(self, base: nn.Module, *strength):
        super().__init__(base, *strength)
        self.register_buffer("lengths", decoded(base).norm(dim=1), persistent=False)  # (out,): ||W_i||, once
        self.lora_magnitude_vector = nn.Parameter(self.lengths.clone())  # (out,)
        self._kept: tuple[torch.Tensor, ...] | None = None  # A, B and scaling, and the lengths that they gave

    def put_into(self, model: nn.Module, path: str) -> None:
        if not isinstance(self.base, Linear4bit):  # a cast may have rounded the weight while this was elsewhere
            self.lengths = decoded(self.base).norm(dim=1)
            self._kept = None
        super().put_into(model, path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:  # each step changes A and B
            self._kept = None
        lengths = self.adapted_lengths() if self.training else self._kept_lengths()
        factor = torch.where(lengths > 0, self.lora_magnitude_vector / lengths.clamp(min=LEAST), 1.0)  # (out,), float32
        if not (self.training and self.dropout.p > 0):
            return self._turned(super().forward(x), factor)
        dropped = self.dropout(x)
        inner = self.base(dropped)
        low = dropped @ self.lora_A.to(x.dtype).t() * self.scaling  # (..., in) @ (in, r) -> (..., r)
        turned = self._turned(inner + low @ self.lora_B.to(x.dtype).t(), factor)
        return self.base(x) - inner + turned  # one bias takes the other away

    def _turned(self, y: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Return factor * (y - bias) + bias, in the dtype of y."""
        turned = factor * y  # float32, as the factor is: in bf16 a factor of 1.001 would be 1
        bias = self.base.bias
        return (turned if bias is None else turned + (1 - factor) * bias).to(y.dtype)

    @torch.no_grad()
    def adapted_lengths(self) -> torch.Tensor:
        """Return ||W + s B A|| of each row, (out_features,) float32."""
        A, B = self.lora_A.float(), self.lora_B.double()
        across = self._times_base(A).double()  # (r, in) @ (in, out) -> (r, out): A W^T
        own = (A.double() @ A.double().t()) @ B.t()  # (r, r) @ (r, out) -> (r, out): A A^T B^T
        change = B.t() * (2 * self.scaling * across + self.scaling**2 * own)
        square = self.lengths.double() ** 2  # (out,)
        return (square + change.sum(0)).maximum(LEAST * square).sqrt().float()

    def _kept_lengths(self) -> torch.Tensor:
        now = (self.lora_A.detach(), self.lora_B.detach(), torch.tensor(self.scaling, dtype=torch.float32))
        # Compared by value, because an assignment to .data leaves no other trace.
        if self._kept is None or not all(map(torch.equal, now, self._kept[:3])):
            self._kept = (*(tensor.clone() for tensor in now), self.adapted_lengths())
        return self._kept[3]

    def _apply(self, fn, recurse: bool = True):
        dtype = self.base.weight.dtype
        super()._apply(fn, recurse)
        self._kept = None  # on the old device
        if self.base.weight.dtype != dtype:  # a cast has rounded the weight; it leaves packed ones alone
            self.lengths = decoded(self.base).norm(dim=1)
        return self

    def _times_base(self, A: torch.Tensor) -> torch.Tensor:
        if isinstance(self.base, Linear4bit):
            return product_4bit.forward(A, self.base.weight)  # without the bias
        return A.to(self.base.weight.dtype) @ as_matrix(self.base, self.base.weight).t()

    def change(self, weight: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        return turned(weight, super().change(weight, rows), self.lora_magnitude_vector[rows])


def turned(weight: torch.Tensor, learned: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Return what is added to `weight`, (out_features, in_features), if its rows become (W + learned) m / ||.||."""
    rows = weight + learned
    lengths = rows.norm(dim=1)
    factor = torch.where(lengths > 0, magnitude.to(rows.device) / lengths, 1.0)  # a row of zeros stays one
    return rows.mul_(factor[:, None]).sub_(weight)
