"""Which rung does what: the functions of kernels/cpu.py and kernels/product.py for CUDA.

A weight is packed, constants, levels, block_size. takes() says which; for others the readable functions run.
"""

import torch

from qlora_lab.kernels.triton import launch, ops
from qlora_lab.kernels.triton.gemv_nf4 import MAX_TOKENS
from qlora_lab.kernels.triton.matmul_nf4 import TOKENS


def takes(n_levels: int, block_size: int) -> bool:
    """4-bit codes, or 8-bit ones in ascending order, in blocks whose size is a power of two from 32 to 4096."""
    return launch.is_block_size(block_size) and (8 < n_levels <= launch.CODES or n_levels == 256)


def quantize_blocks(
    weight: torch.Tensor, thresholds: torch.Tensor, order: torch.Tensor, block_size: int, group: int, tiny: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of quant.quantize.quantize_blocks: (numel,) weights -> packed uint8, absmax (n_blocks,) float32."""
    if len(order) == 256:
        codes, scale = ops.double_quantize(weight, thresholds.new_zeros(()), thresholds, block_size, tiny)
        return codes, scale
    packed, absmax = ops.quantize_nf4(weight, thresholds, order, block_size, tiny)
    return packed, absmax


def dequantize_blocks(weight: tuple, out: torch.Tensor) -> None:
    """Twin of quant.quantize.dequantize_blocks: fills `out`, contiguous float32, bf16 or fp16."""
    packed, constants, levels, block_size = weight
    parts, group = _parts(constants)
    if len(levels) <= launch.CODES:
        ops.dequantize_into(packed, parts, group, levels, block_size, out)
        return
    absmax = ops.double_dequantize(parts, group) if group else constants
    out.view(-1).copy_(ops.double_dequantize([packed, absmax, absmax.new_zeros(()), levels], block_size))


def forward(x: torch.Tensor, weight: tuple, rows: int) -> torch.Tensor:
    """(tokens, columns) -> x W^T, (tokens, rows).

    Fused as long as each weight is decoded once: up to one tile of tokens. Beyond, and for float32, W is decoded into
    memory for one product of torch.
    """
    packed, constants, levels, block_size = weight
    tokens, columns = x.shape
    parts = packed, *_parts(constants), levels, block_size, rows
    if tokens and _is_whole(levels, columns, block_size):
        if tokens <= MAX_TOKENS:
            return ops.gemv_nf4(x, *parts)
        if tokens <= TOKENS and _has_tensor_cores(x):
            return ops.matmul_nf4(x, *parts, None, None, 1.0)
    return x @ _decoded(weight, (rows, columns), x.dtype).t()


def backward(grad: torch.Tensor, weight: tuple, columns: int) -> torch.Tensor:
    """(tokens, rows) -> g W, (tokens, columns); as forward."""
    packed, constants, levels, block_size = weight
    tokens, rows = grad.shape
    if 0 < tokens <= TOKENS and _has_tensor_cores(grad) and _is_whole(levels, columns, block_size):
        return ops.matmul_nf4_backward(grad, packed, *_parts(constants), levels, block_size, columns)
    return grad @ _decoded(weight, (rows, columns), grad.dtype)


def _is_whole(levels: torch.Tensor, columns: int, block_size: int) -> bool:
    return len(levels) <= launch.CODES and columns % block_size == 0


def _has_tensor_cores(x: torch.Tensor) -> bool:
    """Those that Triton compiles for, on this GPU for this dtype: for a T4 it would multiply number by number."""
    new = not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 0)
    return new and x.dtype in (torch.bfloat16, torch.float16)


def _decoded(weight: tuple, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(shape, dtype=dtype, device=weight[0].device)
    dequantize_blocks(weight, out)
    return out


def _parts(constants) -> tuple[list[torch.Tensor], int]:
    return ([constants], 0) if isinstance(constants, torch.Tensor) else (list(constants[:4]), constants[4])
