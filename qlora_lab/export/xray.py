"""Look into a checkpoint in 4 bits without loading it: every key decoded, every rule checked, every byte explained.

In: a safetensors file, or a folder with an index, by ours or bitsandbytes' key names (quant/serialize.py). Out: a
Checkpoint: what each tensor is and what is wrong; `byte_at` explains one byte, `values` decodes any run of weights.
Source: the format of safetensors for offsets, quant/serialize.py for what the parts mean.

Files are mapped, and pages are given back after each look, so a file may be larger than memory.
Not here: two checkpoints side by side (xray_diff.py), the command (cli/xray.py), the picture (show/xray.py).
"""

import math
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from qlora_lab.files.home import expanded
from qlora_lab.files.tensor_header import Part, read_header
from qlora_lab.model.model_files import weight_files
from qlora_lab.quant.codebook import bits_of
from qlora_lab.quant.double_quant import GROUP_SIZE, dynamic_map
from qlora_lab.quant.packing import group_of, unpack
from qlora_lab.quant.quantize import WEIGHT_DTYPES
from qlora_lab.quant.serialize import (
    MOST_STATE,
    STORAGE_DTYPES,
    not_negative,
    part_sizes,
    read_levels,
    read_nested,
    read_state,
    wrong_size,
)
from qlora_lab.quant.stack import STATE as STACK_STATE, stack_from_tensors

PIECE = 2**20  # bytes or weights in memory at once
SHORT = 2**16  # bytes: after a longer read the next bytes are probably asked for
AHEAD = 2**23  # bytes that the system may fetch meanwhile: 500 MB/s from a disk instead of 310
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I8": torch.int8}
DTYPES |= {"U8": torch.uint8}  # all that a part of a 4-bit tensor can be
KNOWN = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
STATE = ".quant_state."
OF_A_STACK = f".{STACK_STATE}"
OF_A_PART = re.compile(rf"(.+)\.(?:{'|'.join(KNOWN)})", re.DOTALL)


@dataclass(frozen=True)
class Tensor4bit:
    """What a quantised tensor's parts say about it. 4 bits is the rule; our files may have 2 to 8."""

    key: str
    quant_type: str  # nf4, fp4, ...
    block_size: int
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the weight, once decoded
    levels: torch.Tensor  # (2^bits,) float32
    offset: float | None  # mean of the constants; None: no double quantization
    bits_per_parameter: float  # of codes and constants; tables and description cost each tensor the same
    names: tuple[str, ...]  # of the parts in the files

    @property
    def bits(self) -> int:
        return bits_of(self.levels)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def n_blocks(self) -> int:
        return -(-self.numel // self.block_size)


@dataclass(frozen=True)
class Half:
    """One half of a byte: a weight on its way from code to value, or padding after the last weight."""

    code: int
    level: float | None  # None: padding whose code the table lacks
    index: int | None  # of the weight in the flattened tensor; None: padding
    place: tuple[int, ...] | None = None  # of the weight in the tensor
    block: int | None = None
    constant: float | None = None  # of the block
    value: float | None = None  # level * constant, rounded to the tensor's dtype
    constant_code: int | None = None  # with double quantization: which of 256 values,
    group: int | None = None  # of which group of 256 constants,
    scale: float | None = None  # multiplied by this scale, plus `offset`
    offset: float | None = None


@dataclass(frozen=True)
class Byte:
    """A byte of packed codes. halves: high, low."""

    key: str
    offset: int  # among the bytes of the tensor
    at: int  # in the file
    value: int
    halves: tuple[Half, Half]


class Checkpoint:
    """A checkpoint that is mapped, not read.

    parts: stored name -> Part, all of them. tensors: key -> Tensor4bit, those that can be decoded.
    stacks: keys of packed experts (quant/stack.py), which are not decoded here. plain: names of tensors that are not
    quantised, and of the parts of stacks. faults: a sentence for each thing that is wrong; `scanned` adds
    those that only the values show, and all those of stacks.
    """

    def __init__(self, path: str | Path):
        """Open a safetensors file, or all files of a model folder.

        Raises ValueError for anything else, and for damage to a header; OSError for what cannot be read.
        """
        self.path = expanded(path)
        self.parts: dict[str, Part] = {}
        for file in weight_files(self.path) if self.path.is_dir() else [self.path]:
            for name, part in read_header(file).items():
                if name in self.parts:
                    raise ValueError(f"{name} is in {self.parts[name].file.name} and in {file.name}: keep one of them")
                self.parts[name] = part
        self._maps = {file: _mapped(file) for file in {part.file for part in self.parts.values()}}
        self.tensors: dict[str, Tensor4bit] = {}
        self.faults: list[str] = []
        # Found first, because their parts have the names of a matrix's.
        self.stacks = {name.removesuffix(OF_A_STACK) for name in self.parts if name.endswith(OF_A_STACK)}
        of_4_bits = self._describe_all()
        self.plain = [name for name in self.parts if name not in of_4_bits]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return entries `start` to `stop` of a stored tensor, flattened, as a copy.

        Raises KeyError for an unknown name, ValueError for a kind that no part of a 4-bit tensor has.
        """
        part = self.parts[name]
        if part.dtype not in DTYPES:
            raise ValueError(f"{name} is {part.dtype}, which no part of a 4-bit tensor is")
        dtype = DTYPES[part.dtype]
        stop = part.numel if stop is None else min(stop, part.numel)
        content = self.read_bytes(name, start * dtype.itemsize, stop * dtype.itemsize)
        return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)

    def read_bytes(self, name: str, start: int, stop: int) -> bytearray:
        """Return a copy of bytes `start` to `stop` of a stored tensor, and give the pages back."""
        part = self.parts[name]
        file = self._maps[part.file]
        if file.size() < part.stop:  # to read on would end the process
            raise ValueError(f"{part.file} has become shorter since it was opened: open it again when it is whole")
        start, stop = part.start + start, min(part.start + stop, part.stop)
        if stop - start > SHORT:
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            file.madvise(mmap.MADV_WILLNEED, first, min(stop + AHEAD, part.stop) - first)
        with memoryview(file) as pages:
            content = bytearray(pages[start:stop])
        file.madvise(mmap.MADV_DONTNEED)
        return content

    def packed(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Return bytes of codes, uint8, whatever dtype they are stored as."""
        return torch.frombuffer(self.read_bytes(key, start, stop), dtype=torch.uint8)

    def _describe_all(self) -> set[str]:
        """Fill `tensors` and `faults`. Return the names that belong to a 4-bit tensor, whole or not."""
        parts_of: dict[str, list[str]] = {}  # key -> its parts, without the codes
        for name in self.parts:
            if name.rpartition(".")[0] in self.stacks:
                continue  # the same names mean other shapes there
            if STATE in name:
                parts_of.setdefault(name.rpartition(STATE)[0], []).append(name)
            elif match := OF_A_PART.fullmatch(name):
                parts_of.setdefault(match[1], []).append(name)
        for name in self.parts:  # what else has such a name
            key = name.rpartition(".")[0]
            if key in parts_of and name not in parts_of[key] and STATE not in name:
                parts_of[key].append(name)
        for key, names in parts_of.items():
            self._describe(key, names)
        return {name for key, names in parts_of.items() for name in (key, *names)}

    def _describe(self, key: str, names: list[str]) -> None:
        """Add a tensor whose description, table and sizes are right, or say what is wrong."""
        try:
            small = self._small(key, names)
            state = read_state(small, key)
            levels = read_levels(small, key, state["quant_type"], torch.device("cpu"))
        except (KeyError, ValueError) as error:
            self.faults.append(str(error.args[0]))
            return
        nested = "nested_offset" in state
        faults = list(self._wrong_parts(key, names, state, bits_of(levels)))
        if nested and not faults:
            try:
                scale = {f"{key}.nested_absmax": self.read(f"{key}.nested_absmax")}
                read_nested(small | scale, key, state, torch.empty(0, dtype=torch.uint8))
            except ValueError as error:
                faults.append(str(error))
        self.faults += faults
        if all(_is_harmless(fault) for fault in faults):
            offset = state["nested_offset"] if nested else None
            stored = [self.parts[name].nbytes for name in part_sizes(state, key, bits_of(levels))]
            bits = 8 * (sum(stored) + 4 * nested) / math.prod(state["shape"])  # the offset is a float32
            described = (state["quant_type"], state["blocksize"], tuple(state["shape"]), _dtype(state["dtype"]))
            self.tensors[key] = Tensor4bit(key, *described, levels, offset, bits, (key, *names))

    def _small(self, key: str, names: list[str]) -> dict[str, torch.Tensor]:
        """Read the parts that are small in every honest file: description and tables."""
        small = [name for name in names if STATE in name or name.endswith("quant_map")]
        for name in small:
            if self.parts[name].nbytes > MOST_STATE:
                raise ValueError(f"{name} has {self.parts[name].nbytes:,} bytes, but at most {MOST_STATE} are needed")
        return {name: self.read(name).view(self.parts[name].shape) for name in small}

    def _wrong_parts(self, key: str, names: list[str], state: dict, bits: int) -> Iterator[str]:
        """Say which parts are missing, of a wrong kind or size, or not known."""
        nested = "nested_offset" in state
        allowed = {key: STORAGE_DTYPES, f"{key}.absmax": (torch.uint8,) if nested else WEIGHT_DTYPES}
        for name, want in part_sizes(state, key, bits).items():
            if name not in self.parts:
                yield f"{name} is missing: the checkpoint is incomplete"
                continue
            part = self.parts[name]
            dtypes = allowed.get(name, WEIGHT_DTYPES)
            if DTYPES.get(part.dtype) not in dtypes:
                words = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                yield f"{name} is {part.dtype}, but {words} is needed there"
            elif (have := part.nbytes if name == key else part.numel) != want:
                yield wrong_size(name, have, want, state["shape"])
        if nested and f"{key}.nested_quant_map" not in self.parts:
            yield f"{key}.nested_quant_map{LACKING}"
        known = {f"{key}.{part}" for part in (KNOWN if nested else KNOWN[:2])}
        for name in names:
            if name not in known and STATE not in name:
                yield f"{name}{EXTRA}"


LACKING = " is missing: bitsandbytes refuses the file, so quantise its original again"
EXTRA = " is not part of its 4-bit tensor: bitsandbytes refuses the file, so remove it"


def _is_harmless(fault: str) -> bool:
    """Tell whether the tensor can be decoded here all the same."""
    return fault.endswith((EXTRA, LACKING))


def _mapped(file: Path) -> mmap.mmap:
    with file.open("rb") as opened:  # the map outlives it
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)  # a look at a few bytes reads a page, not the 32 around it
    return mapped


def _dtype(name: str) -> torch.dtype:
    return next(dtype for dtype in WEIGHT_DTYPES if str(dtype) == f"torch.{name}")


def scanned(checkpoint: Checkpoint, *, progress: bool = True) -> list[str]:
    """Return all faults, also those that values show: constants that are not finite or negative, codes without a level.

    Reads the constants of matrices once, about a tenth of their bytes, and stacks of experts whole, one at a time.
    """
    faults = list(checkpoint.faults)
    checks = [partial(_check_values, checkpoint, tensor) for tensor in checkpoint.tensors.values()]
    checks += [partial(_check_stack, checkpoint, key) for key in sorted(checkpoint.stacks)]
    for check in tqdm(checks, desc="scanning", unit="tensor", disable=not progress, delay=2):
        try:
            check()
        except (KeyError, ValueError) as error:
            faults.append(str(error.args[0]))  # the text of a KeyError would come in quotes
    return faults


def _check_stack(checkpoint: Checkpoint, key: str) -> None:
    """Raise what `load` would raise for a stack: its reader knows every rule already."""
    names = [name for name in checkpoint.parts if name == key or name.rpartition(".")[0] == key]
    stack_from_tensors({name: checkpoint.read(name).view(checkpoint.parts[name].shape) for name in names}, key)


def _check_values(checkpoint: Checkpoint, tensor: Tensor4bit) -> None:
    name = f"{tensor.key}.absmax"
    for start in range(0, tensor.n_blocks, PIECE):
        if tensor.offset is None:
            not_negative(checkpoint.read(name, start, start + PIECE), name)
        else:
            _check_nested(checkpoint, tensor, start)
    if len(tensor.levels) < 2**tensor.bits:
        for start in range(0, tensor.numel, _step(tensor)):
            _check_codes(tensor, codes(checkpoint, tensor.key, start, start + _step(tensor)))


def _check_codes(tensor: Tensor4bit, code: torch.Tensor) -> None:
    if len(code) and (highest := int(code.max())) >= len(tensor.levels):
        raise ValueError(f"{tensor.key} holds code {highest}, but its table has {len(tensor.levels)} levels")


def _check_nested(checkpoint: Checkpoint, tensor: Tensor4bit, start: int) -> None:
    """Raise ValueError for a constant from `start` on that is below zero by more than double quantization rounds."""
    scale = checkpoint.read(f"{tensor.key}.nested_absmax", start // GROUP_SIZE, -(-(start + PIECE) // GROUP_SIZE))
    lowest = constants(checkpoint, tensor.key, start, start + PIECE).min().item()
    rounding = dynamic_map().sort().values.diff().max().item() / 2  # of a constant, as a share of its group's scale
    if lowest < -rounding * scale.float().max().item():
        raise ValueError(
            f"{tensor.key}.absmax holds {lowest:g} once double quantization is undone, but the constant of a block is "
            "at least 0: quantise its original"
        )


def _step(tensor: Tensor4bit) -> int:
    """Return how many weights are decoded at once: whole groups of codes."""
    group = group_of(tensor.bits)[0]
    return PIECE // group * group


def codes(checkpoint: Checkpoint, key: str, start: int, stop: int) -> torch.Tensor:
    """Return codes of weights `start` to `stop`, (n,) uint8. start: at the beginning of a group of codes, as 0 is."""
    tensor = checkpoint.tensors[key]
    n_codes, n_bytes = group_of(tensor.bits)
    stop = min(stop, tensor.numel)
    some = checkpoint.packed(key, start // n_codes * n_bytes, -(-stop // n_codes) * n_bytes)
    return unpack(some, stop - start, tensor.bits)


def constants(checkpoint: Checkpoint, key: str, start: int, stop: int) -> torch.Tensor:
    """Return constants of blocks `start` to `stop`, (n,) float32, double quantization undone."""
    tensor = checkpoint.tensors[key]
    absmax = checkpoint.read(f"{key}.absmax", start, stop)
    if tensor.offset is None:
        return absmax.float()
    first = start // GROUP_SIZE
    scale = checkpoint.read(f"{key}.nested_absmax", first, -(-stop // GROUP_SIZE)).float()
    group = torch.arange(start, start + len(absmax)) // GROUP_SIZE - first
    return dynamic_map()[absmax.int()] * scale[group] + torch.tensor(tensor.offset, dtype=torch.float32)


def values(checkpoint: Checkpoint, key: str, start: int, stop: int) -> torch.Tensor:
    """Decode weights `start` to `stop`, (n,) in the tensor's dtype. start: as for `codes`."""
    tensor = checkpoint.tensors[key]
    code = codes(checkpoint, key, start, stop)
    _check_codes(tensor, code)
    first = start // tensor.block_size
    absmax = constants(checkpoint, key, first, -(-(start + len(code)) // tensor.block_size))
    block = torch.arange(start, start + len(code)) // tensor.block_size - first
    return (tensor.levels.float()[code.int()] * absmax[block]).to(tensor.dtype)


def byte_at(checkpoint: Checkpoint, key: str, offset: int) -> Byte:
    """Explain byte `offset` of the packed codes of `key`: two codes, two levels, two weights, and their constants.

    Raises KeyError for a key that is no 4-bit tensor, ValueError for other bits, or a byte that the tensor lacks.
    """
    if key not in checkpoint.tensors:
        raise KeyError(f"{key} is not a 4-bit tensor that can be decoded: there are {len(checkpoint.tensors)}")
    tensor = checkpoint.tensors[key]
    if tensor.bits != 4:
        raise ValueError(f"{key} has {tensor.bits} bits a code: two codes in one byte are 4 bits each")
    part = checkpoint.parts[key]
    if not 0 <= offset < part.nbytes:
        raise ValueError(f"{key} has bytes 0 to {part.nbytes - 1:,}, but byte {offset:,} is asked for")
    (value,) = checkpoint.read_bytes(key, offset, offset + 1)
    halves = (_half(checkpoint, tensor, code, 2 * offset + i) for i, code in enumerate((value >> 4, value & 15)))
    return Byte(key, offset, part.start + offset, value, tuple(halves))


def _half(checkpoint: Checkpoint, tensor: Tensor4bit, code: int, index: int) -> Half:
    if index >= tensor.numel:  # whatever it holds, nobody decodes it
        return Half(code, tensor.levels[code].item() if code < len(tensor.levels) else None, None)
    _check_codes(tensor, torch.tensor([code], dtype=torch.uint8))
    level = tensor.levels[code].item()
    block = index // tensor.block_size
    constant = constants(checkpoint, tensor.key, block, block + 1)
    value = (tensor.levels[code].float() * constant).to(tensor.dtype).item()
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(index, dtype=torch.int64), tensor.shape))
    half = Half(code, level, index, place, block, constant.item(), value)
    return half if tensor.offset is None else _with_nested(checkpoint, tensor, half)


def _with_nested(checkpoint: Checkpoint, tensor: Tensor4bit, half: Half) -> Half:
    group = half.block // GROUP_SIZE
    (code,) = checkpoint.read(f"{tensor.key}.absmax", half.block, half.block + 1).tolist()
    scale = checkpoint.read(f"{tensor.key}.nested_absmax", group, group + 1).item()
    return replace(half, constant_code=code, group=group, scale=scale, offset=tensor.offset)
