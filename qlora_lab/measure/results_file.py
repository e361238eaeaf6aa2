"""The file that a sweep writes: one row a line, as JSON, in the order in which they were measured.

In: rows, as measure/sweep.py makes them. Out: the same rows again, whatever happened while the last one was written.

Each row ends with a checksum of itself, which `qlora-lab verify` compares; reading does not.
A row counts from the moment its new line is on the disk. A last line without one is what a kill, a power cut or a full
disk left. Reading never changes the file; whoever opens it to append cuts that line off, and holds a lock meanwhile
(files/lock.py): two sweeps into one file would both measure, and append, the same rows.
Not here: how a row is measured (sweep.py).
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from qlora_lab.files import disk
from qlora_lab.files.lock import locked_file
from qlora_lab.files.strict_json import (
    LIST,
    NUMBER,
    OBJECT,
    SWITCH,
    TEXT,
    check_keys,
    or_null,
    parse,
    read_regular,
    whole,
)
from qlora_lab.train.verify import DIFFERS, OK, UNKNOWN, Part

# What decides a row's figures. The seed does not: levels that it drew are there themselves. Nor do commit and machine:
# most commits change no figure, and what the quantiser does is in `quantiser`; sweep.py says what a processor changes.
IDENTITY = ("model", "data", "config", "codebook", "levels", "block_size", "double_quant", "quantiser", "versions")
FIGURES = ("perplexity", "window_losses", "bits_per_parameter", "relative_error", "layer_errors", "entropy")
FIGURES += ("code_share",)
ROW = dict.fromkeys(("model", "data", "config", "versions", "layer_errors"), OBJECT) | {"window_losses": LIST}
ROW |= dict.fromkeys(("perplexity", "bits_per_parameter", "relative_error"), NUMBER) | {"entropy": or_null(NUMBER)}
ROW |= {"codebook": or_null(TEXT), "block_size": or_null(whole(1)), "double_quant": or_null(SWITCH)}
ROW |= {"levels": or_null(LIST), "code_share": or_null(LIST), "quantiser": or_null(TEXT)}
CHECKSUM = re.compile(rb', "sha256": "([0-9a-f]{64})"}$')  # at the end of a row
EARLIER_END = re.compile(rb', "date": "[^"]*"}$')  # of a row of versions without a checksum
LARGEST = 64 * 2**20  # bytes; a row of a model with 210 layers has four thousand
START = b'{"model": {"'  # of every row that was ever written


def identity(row: dict) -> str:
    """The same text for two rows that measure the same. Raises LookupError or TypeError for what is no row."""
    decides = {name: row[name] for name in IDENTITY}
    decides["model"] = [row["model"][name] for name in ("weights_sha256", "config_sha256")]
    decides["data"] = row["data"]["tokens_sha256"]
    return json.dumps(decides, sort_keys=True)


def read_results(path: str | Path) -> list[dict]:
    """The rows of a results file; none where there is no file yet. The file stays as it is.

    A last line that was torn off is left out, with a warning that quotes its start, and so are rows of an older version
    that lack something. Raises ValueError for a line that is no row, OSError for what is no file.
    """
    path = Path(path)
    _check_kind(path)
    return _parsed(path, read_regular(path, LARGEST))[0] if path.exists() else []


@contextmanager
def open_results(path: Path) -> Iterator[tuple[list[dict], BinaryIO]]:
    """Its rows, and the file itself to append to, which is made if need be. Raises as read_results does.

    What is torn off is cut off here. A file that was made and got no row goes again. BlockingIOError says which process
    has the file.
    """
    _check_kind(path)
    with locked_file(path, "sweep"), _gone_if_empty(path), disk.open_for(path, "ab") as file:  # a write is one call
        content = read_regular(path, LARGEST)
        rows, end = _parsed(path, content)
        file.truncate(end)
        if end and content[end - 1 : end] != b"\n":
            file.write(b"\n")
        disk.sync(path.parent)
        yield rows, file


@contextmanager
def _gone_if_empty(path: Path) -> Iterator[None]:
    """Afterwards no empty file is left of what was not there: a mistyped model makes none."""
    made = not path.exists()
    try:
        yield
    finally:
        with suppress(OSError):  # what went wrong before is what is told
            if made and path.stat().st_size == 0:
                disk.remove(path.resolve())


def with_checksum(row: dict) -> dict:
    """The row with one more field at its end, `sha256`: that of its line without this field."""
    return row | {"sha256": hashlib.sha256(json.dumps(row, allow_nan=False).encode()).hexdigest()}


def append_result(file: BinaryIO, row: dict) -> None:
    """Add one line, and wait until it is on the disk."""
    line = json.dumps(row, allow_nan=False).encode() + b"\n"
    try:
        disk.write_all(file, line)
        disk.sync(Path(file.name))
    except OSError as error:
        raise OSError(f"{file.name}: a row cannot be written ({error.strerror}); those before it are there") from None


def verify_rows(path: str | Path) -> list[Part]:
    """Compare each row with its checksum; a Part for each, "row 1" the first. Raises ValueError for a file of others'.

    The rows of earlier versions have none.
    """
    path = Path(path)
    _check_kind(path)
    lines = read_regular(path, LARGEST).splitlines()
    if not lines or not any(line.startswith(START) for line in lines):
        raise ValueError(f"{path} holds no row of a sweep: name what a command of qlora-lab made")
    return [Part(f"row {number}", _state(line)) for number, line in enumerate(lines, 1)]


def _state(line: bytes) -> str:
    match = CHECKSUM.search(line)
    if not match:
        return UNKNOWN if line.startswith(START) and EARLIER_END.search(line) else DIFFERS
    same = hashlib.sha256(line[: match.start()] + b"}").hexdigest() == match[1].decode()
    return OK if same and line.startswith(START) else DIFFERS


def _check_kind(path: Path) -> None:
    if path.exists() and not path.is_file():  # a device may have no end
        raise OSError(f"{path} is a folder or a device: name a file for the results")


def _parsed(path: Path, content: bytes) -> tuple[list[dict], int]:
    """The rows in `content`, and where they end."""
    *lines, last = content.split(b"\n")
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1)]
    end = len(content) - len(last)
    if last:  # what is written whole ends with a new line
        said = f"{path}: line {len(lines) + 1} was torn off"
        if _is_torn(last, first=not lines):
            start = last[:60].decode("utf-8", "replace")
            said += f" and is left out, so that its setting will be run again; it began {start!r}"
        else:
            rows.append(_row(path, len(lines) + 1, last))
            end = len(content)
            said += " behind its last character, so nothing is lost"
        warnings.warn(said, stacklevel=3)
    whole = [row for row in rows if not _lacks(row)]
    if len(whole) < len(rows):
        lacks = next(filter(None, map(_lacks, rows)))
        said = f"{len(rows) - len(whole)} of {len(rows)} rows lack what is measured today, such as {lacks}"
        warnings.warn(f"{path}: {said}: they stay in the file, and are left out", stacklevel=3)
    return whole, end


def _row(path: Path, number: int, line: bytes) -> dict:
    try:
        row = parse(line.decode("utf-8-sig"), "it")  # an editor may have put a mark before the first
        row["model"]["weights_sha256"]  # older versions, too, wrote this
        check_keys(row, ROW, "it")
    except (ValueError, LookupError, TypeError) as error:
        what = f"line {number} is no row of a sweep ({type(error).__name__}: {error})"
        raise ValueError(f"{path}: {what}: mend it, or name another file") from None
    return row


def _is_torn(line: bytes, first: bool) -> bool:
    """Whether it is a row's beginning. A file of anything else is not ours to cut, even if its one line has no end.

    first: no row stands before it to show whose the file is, so a few bytes or zeros show nothing.
    """
    begun = line.rstrip(b"\0")  # what a power cut may leave of bytes that were promised
    try:
        parse(begun.decode("utf-8-sig"), "it")
    except ValueError:
        return begun.startswith(START) or (not first and START.startswith(begun))
    return False


def _lacks(row: dict) -> str:
    """The first thing that a row lacks, or ""."""
    try:
        identity(row)
    except (LookupError, TypeError) as error:
        return str(error)
    return next((repr(name) for name in FIGURES if name not in row), "")
