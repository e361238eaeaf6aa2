"""The rungs as operations of torch: torch.ops.qlora_lab.quantize_nf4 and so on, for torch.compile and autograd.

Each has its kernel; if it returns something, a function that tells the shapes without computing; and, where x, lora_A
and lora_B have gradients, their formula. A quantised weight is frozen. Constants travel as a list: absmax alone, or
absmax_codes, absmax_scale, absmax_offset and the table of the codes; then `group` is how many of them share a scale,
otherwise 0. The launchers' docstrings give shapes and dtypes in full, and raise ValueError.
"""

import torch
from torch.library import custom_op

from qlora_lab.kernels.packed_weight import PackedConstants, PackedWeight
from qlora_lab.kernels.triton import (
    adamw_8bit as rung8,
    dequantize_double as rung3,
    dequantize_nf4 as rung2,
    double_quantize as rung4,
    gemv_nf4 as rung5,
    matmul_nf4 as rung6,
    matmul_nf4_backward as rung7,
    quantize_nf4 as rung1,
)

Tensor = torch.Tensor


@custom_op("qlora_lab::quantize_nf4", mutates_args=())
def quantize_nf4(weight: Tensor, thresholds: Tensor, order: Tensor, block_size: int, tiny: float) -> list[Tensor]:
    """(numel,) weights -> packed uint8, absmax float32. As the launcher of rung 1."""
    return list(rung1.quantize_nf4(weight, thresholds, order, block_size, tiny))


@quantize_nf4.register_fake
def _(weight, thresholds, order, block_size, tiny):
    packed = weight.new_empty((weight.numel() + 1) // 2, dtype=torch.uint8)
    return [packed, weight.new_empty((weight.numel() + block_size - 1) // block_size, dtype=torch.float32)]


@custom_op("qlora_lab::dequantize_nf4", mutates_args=())
def dequantize_nf4(
    packed: Tensor, constants: list[Tensor], group: int, levels: Tensor, block_size: int, numel: int, dtype: torch.dtype
) -> Tensor:
    """Packed codes and constants -> (numel,) weights of `dtype`. Rung 2, or 3 where constants are quantised."""
    out = torch.empty(numel, dtype=dtype, device=packed.device)
    dequantize_into(packed, constants, group, levels, block_size, out)
    return out


@dequantize_nf4.register_fake
def _(packed, constants, group, levels, block_size, numel, dtype):
    return packed.new_empty(numel, dtype=dtype)


@custom_op("qlora_lab::dequantize_into", mutates_args=("out",))
def dequantize_into(
    packed: Tensor, constants: list[Tensor], group: int, levels: Tensor, block_size: int, out: Tensor
) -> None:
    """As dequantize_nf4, into a given contiguous tensor."""
    if len(constants) == 1:  # absmax alone: no double quantization
        rung2.dequantize_nf4(packed, constants[0], levels, block_size, out)
    else:
        rung3.dequantize_double(packed, PackedConstants(*constants, group), levels, block_size, out)


@custom_op("qlora_lab::double_quantize", mutates_args=())
def double_quantize(absmax: Tensor, offset: Tensor, thresholds: Tensor, group: int, tiny: float) -> list[Tensor]:
    """(n_blocks,) constants -> their codes uint8 and scales float32. As the launcher of rung 4."""
    return list(rung4.double_quantize(absmax, offset, thresholds, group, tiny))


@double_quantize.register_fake
def _(absmax, offset, thresholds, group, tiny):
    codes = absmax.new_empty(absmax.shape, dtype=torch.uint8)  # one for each block
    return [codes, absmax.new_empty((absmax.shape[0] + group - 1) // group, dtype=torch.float32)]


@custom_op("qlora_lab::double_dequantize", mutates_args=())
def double_dequantize(constants: list[Tensor], group: int) -> Tensor:
    """The inverse: codes, scales, offset and table -> (n_blocks,) float32."""
    return rung4.double_dequantize(PackedConstants(*constants, group))


@double_dequantize.register_fake
def _(constants, group):
    return constants[0].new_empty(constants[0].shape, dtype=torch.float32)


@custom_op("qlora_lab::gemv_nf4", mutates_args=())
def gemv_nf4(
    x: Tensor, packed: Tensor, constants: list[Tensor], group: int, levels: Tensor, block_size: int, rows: int
) -> Tensor:
    """x (tokens, columns), at most 8 tokens -> x W^T (tokens, rows), same dtype. Rung 5."""
    return rung5.gemv_nf4(x, _weight(packed, constants, group, levels, block_size), rows)


@gemv_nf4.register_fake
def _(x, packed, constants, group, levels, block_size, rows):
    return x.new_empty(x.shape[0], rows)


def _keep_gemv(ctx, inputs, output) -> None:
    x, packed, constants, group, levels, block_size, rows = inputs
    ctx.save_for_backward(packed, levels, *constants)
    ctx.shape, ctx.group, ctx.block_size = (rows, x.shape[1]), group, block_size


def _gemv_gradient(ctx, grad):
    packed, levels, *constants = ctx.saved_tensors  # the bytes of the layer itself, not copies
    rows, columns = ctx.shape
    weight = dequantize_nf4(packed, constants, ctx.group, levels, ctx.block_size, rows * columns, grad.dtype)
    # (tokens, rows) @ (rows, columns): a few tokens do not pay for a kernel of their own
    return grad @ weight.view(rows, columns), None, [None] * len(constants), None, None, None, None


gemv_nf4.register_autograd(_gemv_gradient, setup_context=_keep_gemv)


@custom_op("qlora_lab::matmul_nf4", mutates_args=())
def matmul_nf4(
    x: Tensor, packed: Tensor, constants: list[Tensor], group: int, levels: Tensor, block_size: int, rows: int,
    lora_A: Tensor | None, lora_B: Tensor | None, scaling: float,
) -> Tensor:  # fmt: skip
    """x (tokens, columns) bf16 or fp16 -> x W^T + scaling (x A^T) B^T, (tokens, rows). Rung 6."""
    return rung6.matmul_nf4(x, _weight(packed, constants, group, levels, block_size), rows, lora_A, lora_B, scaling)


@matmul_nf4.register_fake
def _(x, packed, constants, group, levels, block_size, rows, lora_A, lora_B, scaling):
    return x.new_empty(x.shape[0], rows)


@custom_op("qlora_lab::matmul_nf4_backward", mutates_args=())
def matmul_nf4_backward(
    grad: Tensor, packed: Tensor, constants: list[Tensor], group: int, levels: Tensor, block_size: int, columns: int
) -> Tensor:
    """grad (tokens, rows) bf16 or fp16 -> grad W, (tokens, columns). Rung 7."""
    return rung7.matmul_nf4_backward(grad, _weight(packed, constants, group, levels, block_size), columns)


@matmul_nf4_backward.register_fake
def _(grad, packed, constants, group, levels, block_size, columns):
    return grad.new_empty(grad.shape[0], columns)


@custom_op("qlora_lab::adamw_8bit", mutates_args=("param", "codes1", "scale1", "codes2", "scale2"))
def adamw_8bit(
    param: Tensor, grad: Tensor, codes1: Tensor, scale1: Tensor, codes2: Tensor, scale2: Tensor,
    tables: list[Tensor], scalars: list[float], tiny: float,
) -> None:  # fmt: skip
    """One step of AdamW over flat parameters and 8-bit moments, in place. Rung 8."""
    rung8.adamw_8bit(param, grad, codes1, scale1, codes2, scale2, tuple(tables), tuple(scalars), tiny)


def _weight(packed, constants, group, levels, block_size) -> PackedWeight:
    constants = constants[0] if len(constants) == 1 else PackedConstants(*constants, group)
    return PackedWeight(packed, constants, levels, block_size)


def _keep(ctx, inputs, output) -> None:
    x, packed, constants, group, levels, block_size, _, lora_A, lora_B, scaling = inputs
    # x serves the gradient of lora_A alone: the weight is frozen
    ctx.save_for_backward(x if lora_A is not None else None, lora_A, lora_B, packed, levels, *constants)
    ctx.columns, ctx.group, ctx.block_size, ctx.scaling = x.shape[1], group, block_size, scaling


def _gradients(ctx, grad):
    x, lora_A, lora_B, packed, levels, *constants = ctx.saved_tensors
    grad = grad.contiguous()  # kernels count addresses by rows
    grad_x = matmul_nf4_backward(grad, packed, constants, ctx.group, levels, ctx.block_size, ctx.columns)
    grad_A = grad_B = None
    if lora_A is not None:
        through = grad @ lora_B * ctx.scaling  # (tokens, r)
        grad_x = grad_x + through @ lora_A
        # (r, tokens) @ (tokens, columns), and (rows, tokens) @ (tokens, r)
        grad_A, grad_B = through.t() @ x, grad.t() @ (x @ lora_A.t()) * ctx.scaling
    return grad_x, None, [None] * len(constants), None, None, None, None, grad_A, grad_B, None


matmul_nf4.register_autograd(_gradients, setup_context=_keep)
