"""The file that a sweep writes: one row a line, as JSON, in the order in which they were measured.

In: rows, as measure/sweep.py makes them. Out: the same rows again, whatever happened while the last one was written.

A row counts from the moment its new line is on the disk. A last line without one is what a kill or a power cut left.
Not here: what is in a row (sweep.py).
"""

import json
import os
import warnings
from pathlib import Path

from qlora_lab.finetune.files import replacing_file, sync

# What decides a row's figures. The library's commit is in a row too, but does not: most commits change no figure.
IDENTITY = ("model", "data", "config", "codebook", "levels", "block_size", "double_quant", "versions")


def identity(row: dict) -> str:
    """The same text for two rows that measure the same. Raises LookupError or TypeError for what is no row."""
    decides = {name: row[name] for name in IDENTITY}
    decides |= {"model": row["model"]["weights_sha256"], "data": row["data"]["tokens_sha256"]}
    return json.dumps(decides, sort_keys=True)


def read_results(path: str | Path) -> list[dict]:
    """The rows of a results file; none where there is no file yet.

    A last line that was torn off is taken out of the file, with a warning that quotes its start; the others keep every
    byte. Raises ValueError for another line that is no row, and leaves the file as it is.
    """
    path = Path(path)
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1)]
    if not last:  # what is written whole ends with a new line
        return rows
    said = f"{path}: line {len(lines) + 1} was torn off"
    try:
        rows.append(_row(path, len(lines) + 1, last))
        lines.append(last)
        said += " behind its last character: it is kept, and ended"
    except ValueError:
        start = last[:60].decode("utf-8", "replace")
        said += f" and is removed, so that its setting will be run again; it began {start!r}"
    with replacing_file(path) as new:  # never half a file, even if this is interrupted too
        new.write_bytes(b"".join(line + b"\n" for line in lines))
    warnings.warn(said, stacklevel=2)
    return rows


def append_result(path: Path, row: dict) -> None:
    """Add one line, and wait until it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)


def _row(path: Path, number: int, line: bytes) -> dict:
    try:
        row = json.loads(line)
        identity(row)
    except (ValueError, LookupError, TypeError) as error:
        what = f"line {number} is no row of a sweep ({type(error).__name__}: {error})"
        raise ValueError(f"{path}: {what}: mend it, or name another file") from None
    return row
