"""Which rung does what: the functions of kernels/cpu.py and kernels/product.py for CUDA.

takes() says which weights have a rung; the readable functions run for all others. While torch.compile traces, a rung
that multiplies or dequantises is an operation of torch (ops.py). Otherwise it is launched at once: on an H200 the
operation takes 50 us of the host, and the launch 30.
"""

from functools import lru_cache

import torch

from qlora_lab.kernels.packed_weight import PackedConstants, PackedWeight
from qlora_lab.kernels.triton import launch, ops
from qlora_lab.kernels.triton.dequantize_double import dequantize_double
from qlora_lab.kernels.triton.dequantize_nf4 import dequantize_nf4
from qlora_lab.kernels.triton.double_quantize import double_dequantize, double_quantize
from qlora_lab.kernels.triton.gemv_nf4 import MAX_TOKENS, gemv_nf4
from qlora_lab.kernels.triton.matmul_nf4 import FEW, matmul_nf4
from qlora_lab.kernels.triton.quantize_nf4 import quantize_nf4

FEWEST = 3  # tokens for which the tensor cores are worth their tile, most of which is empty


def takes(n_levels: int, block_size: int) -> bool:
    """4-bit codes, or 8-bit ones in ascending order, in blocks whose size is a power of two from 32 to 4096."""
    return launch.is_block_size(block_size) and (8 < n_levels <= launch.CODES or n_levels == 256)


def quantize_blocks(
    weight: torch.Tensor, thresholds: torch.Tensor, order: torch.Tensor, block_size: int, group: int, tiny: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of quant.quantize.quantize_blocks: (numel,) weights -> packed uint8, absmax (n_blocks,) float32."""
    if len(order) == 256:
        return double_quantize(weight, thresholds.new_zeros(()), thresholds, block_size, tiny)
    return quantize_nf4(weight, thresholds, order, block_size, tiny)


def dequantize_blocks(weight: PackedWeight, out: torch.Tensor) -> None:
    """Twin of quant.quantize.dequantize_blocks: fills `out`, contiguous float32, bf16 or fp16."""
    constants = weight.constants
    levels = weight.levels
    if len(levels) > launch.CODES:  # a weight of 8-bit codes has the form of constants whose offset is 0
        absmax = constants if isinstance(constants, torch.Tensor) else _undone(constants)
        out.view(-1).copy_(
            _undone(PackedConstants(weight.packed, absmax, absmax.new_zeros(()), levels, weight.block_size))
        )
    elif torch.compiler.is_compiling():
        ops.dequantize_into(*_flat(weight), out)
    elif isinstance(constants, torch.Tensor):
        dequantize_nf4(weight.packed, constants, levels, weight.block_size, out)
    else:
        dequantize_double(weight.packed, constants, levels, weight.block_size, out)


def _undone(constants: PackedConstants) -> torch.Tensor:
    """Codes of 8 bits -> float32: constants of constants, and weights of 256 levels."""
    return ops.double_dequantize(*_parts(constants)) if torch.compiler.is_compiling() else double_dequantize(constants)


def forward(x: torch.Tensor, weight: PackedWeight, rows: int) -> torch.Tensor:
    """(tokens, columns) -> x W^T, (tokens, rows).

    Fused for a token or two, and for 16-bit x up to 16 tokens. For more, W is decoded into memory for one product of
    torch, which was faster on the one GPU that was measured (bench/README.md).
    """
    tokens, columns = x.shape
    if tokens and len(weight.levels) <= launch.CODES and columns % weight.block_size == 0:
        halves = _has_tensor_cores(x)  # else rung 6 would multiply number by number
        compiling = torch.compiler.is_compiling()
        if tokens < FEWEST or (tokens <= MAX_TOKENS and not halves):
            return ops.gemv_nf4(x, *_flat(weight), rows) if compiling else gemv_nf4(x, weight, rows)
        if tokens <= FEW[0] and halves:
            if compiling:
                return ops.matmul_nf4(x, *_flat(weight), rows, None, None, 1.0)
            return matmul_nf4(x, weight, rows)
    return x @ _decoded(weight, (rows, columns), x.dtype).t()


def backward(grad: torch.Tensor, weight: PackedWeight, columns: int) -> torch.Tensor:
    """(tokens, rows) -> g W, (tokens, columns). W is decoded into memory: rung 7 was slower on a GPU."""
    return grad @ _decoded(weight, (grad.shape[1], columns), grad.dtype)


def _has_tensor_cores(x: torch.Tensor) -> bool:
    """Those that Triton compiles for, on this GPU for this dtype: for a T4 it would multiply number by number."""
    return x.dtype in (torch.bfloat16, torch.float16) and (not x.is_cuda or _is_ampere(x.device))


@lru_cache
def _is_ampere(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _decoded(weight: PackedWeight, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(shape, dtype=dtype, device=weight.packed.device)
    dequantize_blocks(weight, out)
    return out


def _flat(weight: PackedWeight) -> tuple:
    """The same as arguments of an operation of torch, which knows tensors, lists of them and numbers."""
    return weight.packed, *_parts(weight.constants), weight.levels, weight.block_size


def _parts(constants: torch.Tensor | PackedConstants) -> tuple[list[torch.Tensor], int]:
    return ([constants], 0) if isinstance(constants, torch.Tensor) else (list(constants[:-1]), constants.group)
