"""Set two checkpoints side by side: which bytes, codes, constants, blocks and weights differ, tensor by tensor.

In: two Checkpoints (xray.py). Out: a Difference for each tensor that either has. Two tensors of one shape are compared
by their weights even if their data types or block sizes differ; by their codes only if they share a table, and block
by block only if they share a block size.

A piece is in memory at a time, and only a piece whose bytes or constants differ is decoded.
"""

from dataclasses import dataclass, replace
from math import lcm

import torch
from tqdm.auto import tqdm

from qlora_lab.export.xray import DTYPES, PIECE, Checkpoint, Tensor4bit, codes, constants, values
from qlora_lab.quant.packing import group_of

FEW = 10  # numbers of blocks that are kept
COUNTS = ("bytes_differ", "codes_differ", "constants_differ", "values_differ", "blocks_differ")  # of a Difference


@dataclass(frozen=True)
class Difference:
    """How one tensor differs; a count is None where the two cannot be compared by it, or have no such part."""

    name: str
    what: str = ""  # that one of the two lacks it, or how the descriptions differ
    numel: int = 0
    n_blocks: int = 0  # 0: not compared by blocks
    bytes_differ: int | None = None  # of codes of equal bits, or of a tensor that is not quantised
    codes_differ: int | None = None  # nibbles, if they have 4 bits; None where two tables give codes two meanings
    constants_differ: int | None = None  # of blocks of one size
    values_differ: int | None = None  # weights
    blocks_differ: int | None = None  # with a code or a constant that differs
    first_blocks: tuple[int, ...] = ()  # numbers of at most FEW of them
    largest: float = 0.0  # change of a weight

    @property
    def is_equal(self) -> bool:
        return not (self.what or any(getattr(self, name) for name in COUNTS))

    @property
    def is_compared(self) -> bool:
        """Tell whether the weights were compared: a tensor that one lacks, or of another shape, is not."""
        return self.values_differ is not None

    def plus(self, other: "Difference") -> "Difference":
        """Add the counts of another piece of the same tensor; what is None here stays None."""
        mine = {name: getattr(self, name) for name in COUNTS}
        counts = {name: n if n is None else n + (getattr(other, name) or 0) for name, n in mine.items()}
        blocks = (self.first_blocks + other.first_blocks)[:FEW]
        return replace(self, **counts, first_blocks=blocks, largest=max(self.largest, other.largest))


def compare(first: Checkpoint, second: Checkpoint, *, progress: bool = True) -> list[Difference]:
    """Compare all tensors of two checkpoints, in the order of the first. A 4-bit tensor and its parts count as one."""
    ours, theirs = _names(first), _names(second)
    names = [*ours, *(name for name in theirs if name not in ours)]
    bar = tqdm(names, desc="comparing", unit="tensor", disable=not progress, delay=2)
    return [_compare(first, second, name, name in ours, name in theirs) for name in bar]


def _names(checkpoint: Checkpoint) -> dict[str, None]:
    """Name each 4-bit tensor once, and all others, among them the parts of one that cannot be decoded."""
    inside = {name for tensor in checkpoint.tensors.values() for name in tensor.names if name != tensor.key}
    return dict.fromkeys(name for name in checkpoint.parts if name not in inside)


def _compare(first: Checkpoint, second: Checkpoint, name: str, in_first: bool, in_second: bool) -> Difference:
    if not (in_first and in_second):
        return Difference(name, f"only in the {'first' if in_first else 'second'}")
    decoded = name in first.tensors, name in second.tensors
    if all(decoded):
        return _compare_4_bits(first, second, name)
    if any(decoded):
        return Difference(name, f"decoded in 4 bits only in the {'first' if decoded[0] else 'second'}")
    return _compare_plain(first, second, name)


def _compare_4_bits(first: Checkpoint, second: Checkpoint, key: str) -> Difference:
    a, b = first.tensors[key], second.tensors[key]
    if a.shape != b.shape:
        return Difference(key, _described(a, b))
    of_one_size = a.block_size == b.block_size
    comparable = {
        "bytes_differ": a.bits == b.bits,
        "codes_differ": torch.equal(a.levels, b.levels),
        "constants_differ": of_one_size,
        "values_differ": True,
        "blocks_differ": of_one_size,
    }
    counts = {name: 0 for name, is_comparable in comparable.items() if is_comparable}
    found = Difference(key, _described(a, b), a.numel, a.n_blocks if of_one_size else 0, **counts)
    step = lcm(group_of(a.bits)[0], group_of(b.bits)[0], a.block_size if found.n_blocks else 1)
    step *= max(1, PIECE // step)  # a piece ends where a group of codes and a block end
    for start in range(0, a.numel, step):
        try:
            found = found.plus(_piece(first, second, key, start, min(start + step, a.numel)))
        except ValueError as error:  # a code that the table lacks
            return Difference(key, str(error))
    return found


def _described(a: Tensor4bit, b: Tensor4bit) -> str:
    pairs = {
        "shape": (a.shape, b.shape),
        "data type": (a.quant_type, b.quant_type),
        "block size": (a.block_size, b.block_size),
        "dtype": (a.dtype, b.dtype),
        "double quantization": (a.offset is not None, b.offset is not None),
    }
    return "; ".join(f"{name} {one} and {other}" for name, (one, other) in pairs.items() if one != other)


def _piece(first: Checkpoint, second: Checkpoint, key: str, start: int, stop: int) -> Difference:
    """Compare weights `start` to `stop` of a tensor that both can decode."""
    a, b = first.tensors[key], second.tensors[key]
    packed = [_packed(checkpoint, key, start, stop) for checkpoint in (first, second)]
    scales = [_scales(checkpoint, key, start, stop) for checkpoint in (first, second)]
    same_table = torch.equal(a.levels, b.levels)
    same_scales = a.block_size == b.block_size and torch.equal(*scales)
    if same_table and same_scales and torch.equal(*packed) and a.dtype == b.dtype:
        return Difference(key)
    other_codes = torch.ne(*(codes(checkpoint, key, start, stop) for checkpoint in (first, second)))  # (n,)
    decoded = [values(checkpoint, key, start, stop).float() for checkpoint in (first, second)]
    other_bytes = int(torch.ne(*packed).sum()) if a.bits == b.bits else 0
    found = Difference(
        key,
        bytes_differ=other_bytes,
        codes_differ=int(other_codes.sum()) if same_table else None,
        values_differ=int(torch.ne(*decoded).sum()),
        largest=_largest(*decoded),
    )
    if a.block_size != b.block_size:
        return found
    other_scales = torch.ne(*scales)  # (n_blocks,)
    missing = -len(other_codes) % a.block_size
    by_block = torch.nn.functional.pad(other_codes, (0, missing)).view(-1, a.block_size).any(dim=1)  # (n_blocks,)
    if not same_table:
        by_block = torch.nn.functional.pad(torch.ne(*decoded), (0, missing)).view(-1, a.block_size).any(dim=1)
    blocks = ((by_block | other_scales).nonzero().flatten() + start // a.block_size).tolist()
    counts = {"constants_differ": int(other_scales.sum()), "blocks_differ": len(blocks)}
    return replace(found, **counts, first_blocks=tuple(blocks[:FEW]))


def _packed(checkpoint: Checkpoint, key: str, start: int, stop: int) -> torch.Tensor:
    n_codes, n_bytes = group_of(checkpoint.tensors[key].bits)
    return checkpoint.packed(key, start // n_codes * n_bytes, -(-stop // n_codes) * n_bytes)


def _scales(checkpoint: Checkpoint, key: str, start: int, stop: int) -> torch.Tensor:
    size = checkpoint.tensors[key].block_size
    return constants(checkpoint, key, start // size, -(-stop // size))


def _compare_plain(first: Checkpoint, second: Checkpoint, name: str) -> Difference:
    """Compare a tensor that is not quantised, bit for bit; -0.0 differs from 0.0."""
    a, b = first.parts[name], second.parts[name]
    pairs = {"shape": (a.shape, b.shape), "dtype": (a.dtype, b.dtype)}
    if what := "; ".join(f"{kind} {one} and {other}" for kind, (one, other) in pairs.items() if one != other):
        return Difference(name, what)
    found = Difference(name, numel=a.numel, bytes_differ=0, values_differ=0)
    size = a.nbytes // a.numel if a.numel else 1  # bytes of an entry
    for start in range(0, a.nbytes, PIECE):  # PIECE is a power of two: no entry is cut
        pieces = [checkpoint.packed(name, start, start + PIECE) for checkpoint in (first, second)]
        other = torch.ne(*pieces)  # (n,)
        if other.any():
            changed = int(other.view(-1, size).any(dim=1).sum())
            largest = _largest(*(piece.view(DTYPES[a.dtype]) for piece in pieces)) if a.dtype in DTYPES else 0.0
            found = found.plus(Difference(name, bytes_differ=int(other.sum()), values_differ=changed, largest=largest))
    return found


def _largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest change between two finite numbers."""
    change = (a.double() - b.double()).abs()
    return change[change.isfinite()].max().item() if change.isfinite().any() else 0.0
