"""Products with frozen weights as operations of torch, which torch.compile and torch.export keep whole in their graphs.

In: x (tokens, in_features), and a quantised weight as `parts_of` takes it apart: an operation knows tensors, lists of
them and numbers. Out: what the functions of product_4bit.py and kernels/product.py return, to the bit, because they
run inside. Each operation has a function that tells shapes without computing, and a formula for gradients. A
quantised weight has none, and there is no second derivative.

An operation costs 10 us more a call than the function in it, and a product with one token takes 16: only a model that
is compiled or exported goes this way.
"""

import torch
from torch.library import custom_op

from qlora_lab.kernels import product
from qlora_lab.model import product_4bit
from qlora_lab.quant.codebook import CUSTOM
from qlora_lab.quant.double_quant import DoubleQuantized
from qlora_lab.quant.quantize import QuantizedTensor

Tensor = torch.Tensor


def parts_of(weight: QuantizedTensor) -> tuple[list[Tensor], list[int]]:
    """Return (codes, levels, and absmax or its codes, scale and offset) and (block size, out_features, in_features)."""
    q = weight.constants  # one tensor, or three where they are quantised again
    constants = [q.absmax_codes, q.absmax_scale, q.absmax_offset] if isinstance(q, DoubleQuantized) else [q]
    return [weight.packed, weight.levels, *constants], [weight.block_size, *weight.shape]


def _whole(tensors: list[Tensor], numbers: list[int]) -> QuantizedTensor:
    packed, levels, *constants = tensors
    block_size, *shape = numbers
    # the name of the table and the dtype of the original do not matter to a product
    whole = constants[0] if len(constants) == 1 else DoubleQuantized(*constants)
    return QuantizedTensor(packed, whole, levels, CUSTOM, block_size, torch.Size(shape), torch.float32)


# ------------------------------------------------------------------------------------------------------ x W^T, and g W


@custom_op("qlora_lab::forward_4bit", mutates_args=())
def forward_4bit(x: Tensor, tensors: list[Tensor], numbers: list[int]) -> Tensor:
    """x W^T: (tokens, in_features) -> (tokens, out_features), same dtype."""
    return product_4bit.forward(x, _whole(tensors, numbers))


@forward_4bit.register_fake
def _(x, tensors, numbers):
    return x.new_empty(x.shape[0], numbers[1])


@custom_op("qlora_lab::backward_4bit", mutates_args=())
def backward_4bit(grad: Tensor, tensors: list[Tensor], numbers: list[int]) -> Tensor:
    """g W: (tokens, out_features) -> (tokens, in_features), same dtype."""
    return product_4bit.backward(grad, _whole(tensors, numbers))


@backward_4bit.register_fake
def _(grad, tensors, numbers):
    return grad.new_empty(grad.shape[0], numbers[2])


def _keep(ctx, inputs, output) -> None:
    _, tensors, ctx.numbers = inputs
    ctx.save_for_backward(*tensors)  # as they are: no copy


def _gradients(ctx, grad):
    tensors = list(ctx.saved_tensors)  # torch gives a tuple, and an operation takes a list
    return backward_4bit(grad, tensors, ctx.numbers), [None] * len(tensors), None


forward_4bit.register_autograd(_gradients, setup_context=_keep)


# --------------------------------------------------------------------------------------- x W^T + scaling (x A^T) B^T


@custom_op("qlora_lab::forward_adapted", mutates_args=())
def forward_adapted(
    x: Tensor, tensors: list[Tensor], numbers: list[int], A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Base and adapter in one pass: (tokens, out_features), and x A^T, (tokens, r) float32, for backward."""
    return product_4bit.forward_adapted(x, _whole(tensors, numbers), A, B, scaling)


@forward_adapted.register_fake
def _(x, tensors, numbers, A, B, scaling):
    return x.new_empty(x.shape[0], numbers[1]), A.new_empty(x.shape[0], A.shape[0])


@custom_op("qlora_lab::backward_adapted", mutates_args=())
def backward_adapted(
    grad: Tensor, kept: list[Tensor], tensors: list[Tensor], numbers: list[int], scaling: float, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, A and B; kept: x, x A^T, A and B. Without `needs_x` the first has no rows."""
    weight = _whole(tensors, numbers)
    grad_x, grad_A, grad_B = product_4bit.backward_adapted(grad, tuple(kept), weight, scaling, needs_x)
    # an operation cannot return None
    return grad.new_empty(0, weight.shape[1]) if grad_x is None else grad_x, grad_A, grad_B.contiguous()


@backward_adapted.register_fake
def _(grad, kept, tensors, numbers, scaling, needs_x):
    _, _, A, B = kept
    return grad.new_empty(grad.shape[0] if needs_x else 0, numbers[2]), torch.empty_like(A), torch.empty_like(B)


def _keep_adapted(ctx, inputs, output) -> None:
    x, tensors, ctx.numbers, A, B, ctx.scaling = inputs
    # x A^T is a result, so that backward need not compute it again
    ctx.save_for_backward(x, output[1], A, B, *tensors)


def _gradients_adapted(ctx, grad, _):  # nothing reads x A^T but this
    kept = list(ctx.saved_tensors[:4])
    tensors = list(ctx.saved_tensors[4:])
    needs_x = ctx.needs_input_grad[0]  # not in the first layer, behind frozen embeddings
    grad_x, grad_A, grad_B = backward_adapted(grad, kept, tensors, ctx.numbers, ctx.scaling, needs_x)
    return grad_x if needs_x else None, [None] * len(tensors), None, grad_A, grad_B, None


forward_adapted.register_autograd(_gradients_adapted, setup_context=_keep_adapted)


# --------------------------------------------------------------------------- x W^T in float32 for a weight in 16 bits


@custom_op("qlora_lab::forward_wide", mutates_args=())
def forward_wide(x: Tensor, weight: Tensor) -> Tensor:
    """(tokens, in_features) -> (tokens, out_features) float32."""
    return product.forward_unpacked(x, weight)


@forward_wide.register_fake
def _(x, weight):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


@custom_op("qlora_lab::backward_wide", mutates_args=())
def backward_wide(grad: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(tokens, out_features) float32 -> (tokens, in_features) of `dtype`."""
    return product.backward_unpacked(grad, weight).to(dtype)


@backward_wide.register_fake
def _(grad, weight, dtype):
    return grad.new_empty(grad.shape[0], weight.shape[1], dtype=dtype)


def _keep_wide(ctx, inputs, output) -> None:
    x, weight = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(weight)


def _gradients_wide(ctx, grad):
    return backward_wide(grad, *ctx.saved_tensors, ctx.dtype), None


forward_wide.register_autograd(_gradients_wide, setup_context=_keep_wide)
