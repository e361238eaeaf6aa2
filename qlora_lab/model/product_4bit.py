"""x W^T, g W, and the same with an adapter beside W, for a frozen weight that stays packed.

In: x (tokens, in_features) or g (tokens, out_features), float32, bf16 or fp16, and W as a QuantizedTensor. Out: the
same dtype. Each runs the device's kernels, or the definition where there is none for this weight.

Not here: gradients as autograd sees them (linear4bit.py), and as torch.compile does (product_ops.py).
"""

from types import ModuleType

import torch

from qlora_lab.kernels import product_for
from qlora_lab.quant.quantize import QuantizedTensor, dequantize


def product_of(weight: QuantizedTensor) -> ModuleType | None:
    """Return the kernels for products with this weight, or None."""
    return product_for(weight.device.type, len(weight.levels), weight.block_size)


def forward(x: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    """(tokens, in_features) -> x W^T, (tokens, out_features)."""
    if product := product_of(weight):
        return product.forward(x, weight.plain, weight.shape[0])
    return x @ dequantize(weight, x.dtype).t()  # (tokens, in) @ (in, out) -> (tokens, out)


def backward(grad: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    """(tokens, out_features) -> g W, (tokens, in_features)."""
    if product := product_of(weight):
        return product.backward(grad, weight.plain, weight.shape[1])
    return grad @ dequantize(weight, grad.dtype)  # (tokens, out) @ (out, in) -> (tokens, in)


def forward_adapted(
    x: torch.Tensor, weight: QuantizedTensor, A: torch.Tensor, B: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x W^T + scaling (x A^T) B^T, (tokens, out_features), and x A^T, (tokens, r). For the CPU's product."""
    product = product_of(weight)
    thin = product.Thin(A.t(), scaling * B.t(), A.new_empty(len(x), len(A)))  # low: (tokens, r)
    return product.forward(x, weight.plain, weight.shape[0], thin), thin.low


def backward_adapted(
    grad: torch.Tensor, kept: tuple[torch.Tensor, ...], weight: QuantizedTensor, scaling: float, needs_x: bool
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Return the gradients of x (None unless needed), A and B from g. kept: x, x A^T, A and B of forward_adapted."""
    x, low, A, B = kept
    product = product_of(weight)
    thin = product.Thin(scaling * B, A, torch.empty_like(low))  # the same product with A and B in swapped roles
    grad_x = None
    if needs_x:
        grad_x = product.backward(grad, weight.plain, weight.shape[1], thin)
    else:  # the layer after a frozen embedding: only A and B learn
        torch.mm(grad.to(B.dtype), thin.down, out=thin.low)  # (tokens, out) @ (out, r) -> (tokens, r)
    grad_B = product.outer(low, grad).t() * scaling  # (r, out) -> (out, r)
    return grad_x, product.outer(thin.low, x), grad_B
