"""Rung 8. Twin of qlora_lab.optim.adamw_8bit.adamw_8bit: one step of AdamW over a page of optimizer state.

Both moments are undone, moved, used, and quantised again without leaving the program. Moved for each parameter: 4 bytes
of it and 4 of its gradient (2 and 2 in bf16) and 2 of its moments are read, 4 and 2 are written; a step that goes over
memory for each operation moves about 80.
"""

import torch
import triton
import triton.language as tl

from qlora_lab.kernels.triton.double_quantize import nearest_of
from qlora_lab.kernels.triton.launch import NO_FUSION, check_device, check_flat, check_numel, on
from qlora_lab.kernels.triton.quantize_nf4 import absmax_of, scaled

BLOCK_SIZE = 256  # parameters that share a constant
BLOCKS = 4  # in a program


@triton.jit
def _adamw_8bit_kernel(
    param, grad, codes1, scale1, codes2, scale2, table1, limits1, table2, limits2, numel, tiny,
    beta1, beta2, rest1, rest2, decay, size, correction, eps, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    blocks = pid * BLOCKS + tl.arange(0, BLOCKS)
    offsets = blocks[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]  # (blocks, parameters of a block)
    mask = offsets < numel
    block_mask = blocks * BLOCK_SIZE < numel
    g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(param + offsets, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(table1 + tl.load(codes1 + offsets, mask=mask, other=0))
    m *= tl.load(scale1 + blocks, mask=block_mask)[:, None]
    v = tl.load(table2 + tl.load(codes2 + offsets, mask=mask, other=0))
    v *= tl.load(scale2 + blocks, mask=block_mask)[:, None]
    m = tl.where(mask, m * beta1 + g * rest1, 0.0)  # what lies beyond the last parameter must not raise a maximum
    v = tl.where(mask, v * beta2 + g * g * rest2, 0.0)
    p = p * decay - tl.div_rn(m, tl.sqrt_rn(v) * correction + eps) * size
    tl.store(param + offsets, p.to(param.dtype.element_ty), mask=mask)

    absmax = absmax_of(m)  # (blocks,)
    tl.store(scale1 + blocks, absmax, mask=block_mask)
    tl.store(codes1 + offsets, nearest_of(scaled(m, absmax, tiny), limits1), mask=mask)
    absmax = absmax_of(v)
    tl.store(scale2 + blocks, absmax, mask=block_mask)
    tl.store(codes2 + offsets, nearest_of(scaled(v, absmax, tiny), limits2), mask=mask)


def adamw_8bit(
    param: torch.Tensor, grad: torch.Tensor,
    codes1: torch.Tensor, scale1: torch.Tensor, codes2: torch.Tensor, scale2: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    scalars: tuple[float, float, float, float, float, float], tiny: float,
) -> None:  # fmt: skip
    """Change all but `grad` in place. param, grad: (numel,) float32, bf16 or fp16, contiguous.

    codes1, codes2: (numel,) uint8. scale1, scale2: (ceil(numel / 256),) float32. tables: levels (256,) and thresholds
    (255,) of the first moment, then of the second, ascending. scalars: beta1, beta2, what is left of a parameter, the
    step size, the second moment's correction, eps. Raises ValueError before any launch for what does not match.
    """
    named_tables = {f"table {i}": table for i, table in enumerate(tables, start=1)}
    check_device(param=param, grad=grad, codes1=codes1, scale1=scale1, codes2=codes2, scale2=scale2, **named_tables)
    numel = param.numel()
    check_numel(numel)
    check_flat("param", param, numel)
    check_flat("grad", grad, numel)
    check_flat("codes1", codes1, numel, torch.uint8)
    check_flat("codes2", codes2, numel, torch.uint8)
    check_flat("scale1", scale1, -(-numel // BLOCK_SIZE), torch.float32)
    check_flat("scale2", scale2, -(-numel // BLOCK_SIZE), torch.float32)
    for (name, table), length in zip(named_tables.items(), (256, 255, 256, 255), strict=True):
        check_flat(name, table, length, torch.float32)
    if len(scalars) != 6:
        raise ValueError(
            f"{len(scalars)} scalars are given: a step takes beta1, beta2, decay, size, correction and eps"
        )
    beta1, beta2, *others = scalars
    grid = (triton.cdiv(numel, BLOCK_SIZE * BLOCKS),)
    with on(param):
        _adamw_8bit_kernel[grid](
            param, grad, codes1, scale1, codes2, scale2, *tables, numel, tiny,
            beta1, beta2, 1 - beta1, 1 - beta2, *others, BLOCK_SIZE, BLOCKS, **NO_FUSION,
        )  # fmt: skip
