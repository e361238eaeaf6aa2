"""Read and append to a file of results: one row per line, as JSON, in the order of the measurements.

A Kind says which fields a row has: SWEEP here, ABLATIONS in ablations.py, ANSWERS in answers.py, GAMES in play.py.

Each row ends with a checksum of itself; `qlora-lab verify` compares it, reading does not.
A row counts once its new line is on the disk. A kill, a power cut or a full disk leaves a last line without one.
Reading never changes the file. Opening it to append cuts that line off and takes a lock (files/lock.py), for two sweeps
into one file would measure, and append, the same rows.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from qlora_lab.files import disk
from qlora_lab.files.checksums import DIFFERS, OK, Part
from qlora_lab.files.home import expanded
from qlora_lab.files.lock import locked_file
from qlora_lab.files.strict_json import (
    LIST,
    NUMBER,
    OBJECT,
    SWITCH,
    TEXT,
    Rule,
    check_keys,
    or_null,
    parse,
    read_regular,
    whole,
)

# The fields that decide a row's figures. The seed is not among them: the row holds the levels that it drew. Nor are
# commit and machine: most commits change no figure, `quantiser` tells those that do, and sweep.py says what a processor
# changes.
IDENTITY = ("model", "data", "config", "codebook", "levels", "block_size", "double_quant", "quantiser", "versions")
ROW = dict.fromkeys(("model", "data", "config", "versions", "layer_errors"), OBJECT) | {"window_losses": LIST}
ROW |= dict.fromkeys(("perplexity", "bits_per_parameter", "relative_error"), NUMBER) | {"entropy": or_null(NUMBER)}
ROW |= {"codebook": or_null(TEXT), "block_size": or_null(whole(1)), "double_quant": or_null(SWITCH)}
ROW |= {"levels": or_null(LIST), "code_share": or_null(LIST), "quantiser": or_null(TEXT)}
CHECKSUM = re.compile(rb', "sha256": "([0-9a-f]{64})"}$')  # at the end of a row
LARGEST = 64 * 2**20  # bytes; a row has about 4,000 for a model with 210 layers


@dataclass(frozen=True)
class Kind:
    """The rows of one kind of measurement."""

    command: str  # that measures them
    of: str  # what a row is a row of, for messages
    rules: dict[str, Rule]  # of its fields
    decisive: tuple[str, ...]  # fields that decide its figures
    first: str = "model"  # the field that each row begins with, an object

    @property
    def start(self) -> bytes:
        """The first bytes of every row."""
        return _start(self.first)


def _start(first: str) -> bytes:
    return f'{{"{first}": {{"'.encode()


SWEEP = Kind("sweep", "a sweep", ROW, IDENTITY)  # the default: it had its file before other kinds came
START = SWEEP.start
STARTS = (START, _start("system"), _start("tournament"), _start("settings"))  # of all kinds: `verify` is not told which


def identity(row: dict, kind: Kind = SWEEP) -> str:
    """Return a text that is equal for two rows that measure the same. LookupError or TypeError if it is not a row."""
    decides = {name: row[name] for name in kind.decisive}
    if "model" in decides:
        decides["model"] = [row["model"][name] for name in ("weights_sha256", "config_sha256")]
    if "data" in decides:
        decides["data"] = row["data"]["tokens_sha256"]  # equal tokens, whatever the text's name
    return json.dumps(decides, sort_keys=True)


def read_results(path: str | Path, kind: Kind = SWEEP) -> list[dict]:
    """Read the rows of a results file, without changing it; no rows if there is no file yet.

    A torn last line is left out, with a warning that quotes its start. Raises ValueError for a line that is not a row,
    OSError for a path that is not a file.
    """
    path = expanded(path)
    _check_kind(path)
    return _parsed(path, read_regular(path, LARGEST), kind)[0] if path.exists() else []


@contextmanager
def open_results(path: Path, kind: Kind = SWEEP) -> Iterator[tuple[list[dict], BinaryIO]]:
    """Yield the rows, and the file opened to append to, created if necessary. Raises what read_results raises.

    Cuts off a torn last line. Removes a file that it created and that got no row. BlockingIOError names the process
    that uses the file.
    """
    _check_kind(path)
    with (
        locked_file(path, kind.command),
        _gone_if_empty(path),
        disk.open_for(path, "ab") as file,
    ):  # a write is one call
        content = read_regular(path, LARGEST)
        rows, end = _parsed(path, content, kind)
        file.truncate(end)  # cuts off a torn line
        if end and content[end - 1 : end] != b"\n":  # the last row is whole but for its new line
            file.write(b"\n")
        disk.sync(path.parent)  # a new file's name is on the disk, too
        yield rows, file


@contextmanager
def _gone_if_empty(path: Path) -> Iterator[None]:
    """Remove a new file that stayed empty, as after a mistyped name of a model."""
    made = not path.exists()  # before open_results creates it
    try:
        yield
    finally:
        with suppress(OSError):  # the first error is the one to report
            if made and path.stat().st_size == 0:
                disk.remove(path.resolve())


def with_checksum(row: dict) -> dict:
    """Return the row with one more field at its end, `sha256`, the checksum of its line without this field."""
    return row | {"sha256": hashlib.sha256(json.dumps(row, allow_nan=False).encode()).hexdigest()}


def append_result(file: BinaryIO, row: dict) -> None:
    """Append one line, and wait until it is on the disk."""
    line = json.dumps(row, allow_nan=False).encode() + b"\n"
    try:
        disk.write_all(file, line)
        disk.sync(Path(file.name))
    except OSError as error:
        raise OSError(f"{file.name}: a row cannot be written ({error.strerror}); earlier rows are safe") from None


def verify_rows(path: str | Path) -> list[Part]:
    """Return a Part for each row, compared with its checksum. Raises ValueError for a file without a row of ours."""
    path = expanded(path)
    _check_kind(path)
    lines = read_regular(path, LARGEST).splitlines()  # of bytes
    if not lines or not any(line.startswith(STARTS) for line in lines):
        raise ValueError(
            f"{path} holds no row of a sweep or a tournament: name a file that a command of qlora-lab wrote"
        )
    return [Part(f"row {number}", _state(line)) for number, line in enumerate(lines, 1)]


def _state(line: bytes) -> str:
    match = CHECKSUM.search(line)
    same = match and hashlib.sha256(line[: match.start()] + b"}").hexdigest() == match[1].decode()
    return OK if same and line.startswith(STARTS) else DIFFERS


def _check_kind(path: Path) -> None:
    if path.exists() and not path.is_file():  # reading a device may never end
        raise OSError(f"{path} is a folder or a device: name a file for the results")


def _parsed(path: Path, content: bytes, kind: Kind) -> tuple[list[dict], int]:
    """Parse the rows in `content`. Returns them and their end, in bytes."""
    *lines, last = content.split(b"\n")
    rows = [_row(path, number, line, kind) for number, line in enumerate(lines, 1)]
    end = len(content) - len(last)
    if last:  # a whole write ends with a new line
        said = f"{path}: line {len(lines) + 1} was torn off"
        if _is_torn(last, kind.start, first=not lines):
            start = last[:60].decode("utf-8", "replace")
            said += f" and is left out, so it will be measured again; it began {start!r}"
        else:
            rows.append(_row(path, len(lines) + 1, last, kind))
            end = len(content)
            said += " behind its last character, so nothing is lost"
        warnings.warn(said, stacklevel=3)
    return rows, end


def _row(path: Path, number: int, line: bytes, kind: Kind) -> dict:
    try:
        row = parse(line.decode("utf-8-sig"), "it")  # an editor may have put a byte order mark before the first
        check_keys(row, kind.rules, "it", kind.rules)
        identity(row, kind)  # LookupError if it lacks a checksum of the model or of the tokens
    except (ValueError, LookupError, TypeError) as error:
        problem = f"line {number} is not a row of {kind.of} ({type(error).__name__}: {error})"
        raise ValueError(f"{path}: {problem}: mend it, or name another file") from None
    return row


def _is_torn(line: bytes, start: bytes, first: bool) -> bool:
    """Tell whether `line` begins as a row does. A file of anything else is not ours to cut.

    start: the first bytes of a row. first: no row before it shows whose file it is, so a few bytes prove nothing.
    """
    begun = line.rstrip(b"\0")  # a power cut may leave zeros in place of bytes
    try:
        parse(begun.decode("utf-8-sig"), "it")
    except ValueError:
        return begun.startswith(start) or (not first and start.startswith(begun))
    return False
