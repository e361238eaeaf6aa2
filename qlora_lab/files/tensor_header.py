"""Read the header of a safetensors file strictly: which tensor lies where. No tensor is read, and torch is not needed.

In: a path. Out: name -> Part, in the order of the bytes.
Source: the format of safetensors: 8 bytes with the length of the header, JSON, then all tensors without a gap.
Errors name the file and the tensor; those of safetensors name neither.
"""

import math
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple

from qlora_lab.files.strict_json import check_characters, check_regular, decoded, parse

LONGEST = 100_000_000  # bytes of a header: safetensors' own limit
LENGTH = 8  # bytes that hold the length of the header
METADATA = "__metadata__"
MOST_SIZES = 64  # dimensions of a numpy array; a product of more, and of larger numbers, would take minutes
BEYOND = 2**63  # sizes and offsets are below
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
COPY = "take another copy"
SIZES = f"a list of at most {MOST_SIZES} whole numbers below 2^63"
OTHERS = {  # how files of other formats begin
    b"PK\3\4": "a zip archive, which torch.save writes: it holds a pickle, and a pickle can run any program",
    b"\x80\2": "a pickle, which can run any program",
    b"\x80\3": "a pickle, which can run any program",
    b"\x80\4": "a pickle, which can run any program",
    b"\x80\5": "a pickle, which can run any program",
    b"GGUF": "a GGUF file",
}


class Part(NamedTuple):
    """Where a tensor lies: bytes `start` to `stop` of `file`."""

    file: Path
    dtype: str  # safetensors' name, such as "BF16"
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Part]:
    """Return all tensors of a safetensors file.

    Raises ValueError for another format, a header that is cut off or not JSON, and tensors whose sizes, offsets or
    kinds cannot be right. OSError for a file that cannot be read.
    """
    check_regular(path)
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        start = file.read(LENGTH)
        length = int.from_bytes(start, "little")
        header = file.read(length) if length <= min(size - LENGTH, LONGEST) else b""
    if not header.startswith(b"{"):  # a length can begin as a pickle does
        raise ValueError(_no_safetensors(path, start, size))
    where = f"{path}: the header"
    text = decoded(header, where)
    entries = parse(text, where)
    if not isinstance(entries, dict):
        raise ValueError(f"{where} is {short(entries)}, but must be a JSON object: {COPY}")
    if "\\u" in text:  # only an escape can spell half of a surrogate pair
        check_characters(entries, where)
    entries.pop(METADATA, None)
    first = LENGTH + length  # the offsets in the header count from here
    parts = {name: _part(path, name, entry, first) for name, entry in entries.items()}
    parts = dict(sorted(parts.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_places(path, parts, first, size)
    return parts


def _no_safetensors(path: Path, start: bytes, size: int) -> str:
    for magic, what in OTHERS.items():
        if start.startswith(magic):
            return f"{path} is {what}: only safetensors files are read"
    return f"{path} has {size:,} bytes and no header of safetensors: it is cut off, or of another format"


def _part(path: Path, name: str, entry: object, first: int) -> Part:
    """Read one entry. Raises ValueError unless it is a tensor whose bytes have the size of its shape."""
    where = f"{path}: {_named(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} is {short(entry)}, but must have a dtype, a shape and data_offsets: {COPY}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{where} has dtype {short(dtype)}, but must have one of {', '.join(BITS)}: {COPY}")
    if not _are_sizes(shape):
        raise ValueError(f"{where} has shape {short(shape)}, but must have {SIZES}: {COPY}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where} has data_offsets {short(offsets)}, but must have a start and an end: {COPY}")
    start, stop = offsets
    nbytes = math.prod(shape) * BITS[dtype] // 8
    if stop - start != nbytes:
        shown = f"{dtype} of shape {short(tuple(shape))}"
        raise ValueError(f"{where} has {short(stop - start)} bytes, but {shown} takes {short(nbytes)}: {COPY}")
    return Part(path, dtype, tuple(shape), first + start, first + stop)


def _are_sizes(value: object) -> bool:
    is_short = isinstance(value, list) and len(value) <= MOST_SIZES
    return is_short and all(type(size) is int and 0 <= size < BEYOND for size in value)


def _check_places(path: Path, parts: dict[str, Part], first: int, size: int) -> None:
    """Raise ValueError unless the tensors fill the file from the header to the end, each byte once."""
    end = first
    for name, part in parts.items():
        if part.stop > size:
            past = f"ends at byte {short(part.stop)}, but the file has {size:,}"
            raise ValueError(f"{path}: {_named(name)} {past}: it is cut off: {COPY}")
        if part.start != end:
            what = "overlaps the tensor before it" if part.start < end else "leaves a gap before it"
            raise ValueError(f"{path}: {_named(name)} begins at byte {part.start:,} and {what}: {COPY}")
        end = part.stop
    if end != size:
        raise ValueError(f"{path} has {size - end:,} bytes after its last tensor: {COPY}")


def _named(name: str) -> str:
    """Quote a name that nobody can read: an empty one, or one with control characters."""
    return name if name.isprintable() and 0 < len(name) < 200 else short(name)
