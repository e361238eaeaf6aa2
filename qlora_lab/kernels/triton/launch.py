"""What the rungs' launchers share: checks before any launch, and how words and constants are handed over.

Every check raises ValueError with what was given and what is allowed. A kernel looks at nothing: a wrong length would
read the memory of somebody else.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from triton import knobs

from qlora_lab.kernels.packed_weight import PackedConstants, PackedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights and activations
MIN_BLOCK, MAX_BLOCK = 32, 4096  # a word holds 8 codes, and loads of 16 bytes 32
MAX_TOKENS = 65535 * 128  # the second dimension of a grid ends at 65535, a tile has 128 tokens
MAX_NUMEL = 2**31 - 2**13  # so that the last program's indices fit, too
CODES = 16  # entries in the table of a 4-bit code; shorter tables are filled up
NO_FUSION = {"enable_fp_fusion": False}  # a product and a sum are rounded apart, as the twins round


def check_device(**tensors: torch.Tensor) -> None:
    """All on one CUDA device, or on the CPU if Triton interprets."""
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{listed}: the tensors of one launch lie on one device")
    name, device = next(iter(devices.items()))
    wanted = "cpu" if knobs.runtime.interpret else "cuda"
    if device.type != wanted:
        hint = "because TRITON_INTERPRET is set" if wanted == "cpu" else "or TRITON_INTERPRET=1 from the start"
        raise ValueError(f"{name} is on {device}: Triton needs {wanted} here, {hint}")


def on(tensor: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device; within this, it is the one of `tensor`."""
    elsewhere = tensor.is_cuda and tensor.device.index != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if elsewhere else nullcontext()


def is_block_size(block_size: int) -> bool:
    """A power of two from 32 to 4096: whole words, whole tiles."""
    return MIN_BLOCK <= block_size <= MAX_BLOCK and not block_size & (block_size - 1)


def check_block_size(block_size: int, name: str = "block_size") -> None:
    if not is_block_size(block_size):
        allowed = f"a power of two, {MIN_BLOCK} to {MAX_BLOCK}"
        raise ValueError(f"{name}={block_size} is not allowed: kernels take {allowed}")


def check_dtype(name: str, tensor: torch.Tensor, *allowed: torch.dtype) -> None:
    """One of `allowed`, by default what a weight can be."""
    allowed = allowed or DTYPES
    if tensor.dtype not in allowed:
        listed = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}: it must be {listed}")


def check_flat(name: str, tensor: torch.Tensor, length: int, *allowed: torch.dtype) -> None:
    """Flat, contiguous, of this length, and of an allowed dtype."""
    check_dtype(name, tensor, *allowed)
    if tensor.dim() != 1 or not tensor.is_contiguous() or len(tensor) != length:
        layout = "" if tensor.is_contiguous() else ", not contiguous"
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}{layout}: it must be flat, with {length} entries")


def check_offset(offset: torch.Tensor) -> None:
    check_dtype("absmax_offset", offset, torch.float32)
    if offset.numel() != 1:
        raise ValueError(f"absmax_offset has shape {tuple(offset.shape)}: it must be one number")


def check_numel(numel: int) -> None:
    """Kernels count in 32 bits."""
    if not 0 < numel < MAX_NUMEL:
        raise ValueError(f"a tensor has {numel} elements: kernels take 1 to {MAX_NUMEL - 1} at a time")


def table_of(levels: torch.Tensor) -> torch.Tensor:
    """(n,) float32 levels, n <= 16, filled up to 16."""
    check_dtype("levels", levels, torch.float32)
    if levels.dim() != 1 or not 2 <= len(levels) <= CODES:
        raise ValueError(f"levels has shape {tuple(levels.shape)}: a 4-bit code has 2 to {CODES} of them")
    return torch.nn.functional.pad(levels, (0, CODES - len(levels))) if len(levels) < CODES else levels.contiguous()


def words_of(packed: torch.Tensor, numel: int) -> torch.Tensor:
    """Packed uint8 as int32 words of eight codes; copied only if its length, or its address, is odd."""
    check_numel(numel)
    check_flat("packed", packed, -(-numel // 2), torch.uint8)
    if len(packed) % 4:
        packed = torch.nn.functional.pad(packed, (0, -len(packed) % 4))
    if packed.data_ptr() % 16:
        packed = packed.clone()
    return packed.view(torch.int32)


class Constants(NamedTuple):
    """Arguments of codes.constants_of, after `blocks` and `mask`."""

    absmax: torch.Tensor  # (n_blocks,) float32, or uint8 codes
    scale: torch.Tensor | None  # (n_groups,) float32
    offset: torch.Tensor | None  # () float32
    table: torch.Tensor | None  # (256,) float32
    group: int  # 0: absmax is not quantised


def named(constants: torch.Tensor | PackedConstants) -> dict[str, torch.Tensor]:
    """The tensors of constants under the names that errors use."""
    if isinstance(constants, torch.Tensor):
        return {"absmax": constants}
    names = "absmax_codes", "absmax_scale", "absmax_offset", "table of constants"
    return dict(zip(names, constants[:-1], strict=True))


def checked_constants(constants: torch.Tensor | PackedConstants, n_blocks: int) -> Constants:
    if isinstance(constants, torch.Tensor):
        check_flat("absmax", constants, n_blocks, torch.float32)
        return Constants(constants, None, None, None, 0)
    codes, scale, offset, table, group = constants
    check_block_size(group, "group")
    check_flat("absmax_codes", codes, n_blocks, torch.uint8)
    check_flat("absmax_scale", scale, -(-n_blocks // group), torch.float32)
    check_flat("table of constants", table, 256, torch.float32)
    check_offset(offset)
    return Constants(codes, scale, offset, table, group)


def checked_codes(
    packed: torch.Tensor, constants: torch.Tensor | PackedConstants,
    levels: torch.Tensor, block_size: int, out: torch.Tensor,
) -> tuple[torch.Tensor, Constants, torch.Tensor]:  # fmt: skip
    """Words, constants and levels of a weight that is to be dequantised into `out`, contiguous, of a weight's dtype."""
    check_device(packed=packed, levels=levels, out=out, **named(constants))
    check_block_size(block_size)
    check_dtype("out", out)
    if not out.is_contiguous():
        raise ValueError(f"out of shape {tuple(out.shape)} is not contiguous: it must be")
    numel = out.numel()
    return words_of(packed, numel), checked_constants(constants, -(-numel // block_size)), table_of(levels)


def check_product(
    x: torch.Tensor, columns: int, rows: int, weight: PackedWeight, dtypes: tuple[torch.dtype, ...]
) -> tuple[torch.Tensor, Constants, torch.Tensor]:
    """Words, constants and levels of a weight (rows, columns) that is to be multiplied by the matrix x."""
    check_device(x=x, packed=weight.packed)
    check_dtype("x", x, *dtypes)
    if x.dim() != 2 or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}: it must be a matrix of at least one token")
    tokens = x.shape[0]
    check_numel(tokens * max(rows, columns))
    if tokens > MAX_TOKENS:
        raise ValueError(f"x has {tokens} tokens: kernels take at most {MAX_TOKENS} at a time")
    return checked_weight(weight, rows, columns)


def checked_weight(weight: PackedWeight, rows: int, columns: int) -> tuple[torch.Tensor, Constants, torch.Tensor]:
    """Words, constants and levels of a weight of this shape, kept in `weight.prepared` once they are checked."""
    packed = weight.packed
    key = (rows, columns, packed.data_ptr())  # the memory can move
    if weight.prepared and weight.prepared[0] == key:
        return weight.prepared[1]
    check_device(packed=packed, levels=weight.levels, **named(weight.constants))
    block_size = weight.block_size
    check_block_size(block_size)
    if columns % block_size:
        raise ValueError(f"a row of {columns} columns is not whole blocks of {block_size}: dequantise the weight first")
    words = words_of(packed, rows * columns)
    constants = checked_constants(weight.constants, rows * columns // block_size)
    parts = words, constants, table_of(weight.levels)
    if words.data_ptr() == packed.data_ptr():  # a copy would be held beside the weight
        weight.prepared = key, parts
    return parts


def check_adapter(x: torch.Tensor, rows: int, lora_A: torch.Tensor | None, lora_B: torch.Tensor | None) -> int:
    """The rank r of lora_A (r, columns) and lora_B (rows, r), 0 where there is none."""
    if lora_A is None and lora_B is None:
        return 0
    if lora_A is None or lora_B is None:
        raise ValueError("only one of lora_A and lora_B is given: an adapter is both")
    check_device(x=x, lora_A=lora_A, lora_B=lora_B)
    rank = len(lora_A)
    for name, matrix, shape in (("lora_A", lora_A, (rank, x.shape[1])), ("lora_B", lora_B, (rows, rank))):
        check_dtype(name, matrix, x.dtype)
        if tuple(matrix.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(matrix.shape)}: it must be {shape}")
    return rank
