"""Records: what a user brings, one after the other, each with its place.

In: a JSON-lines file or a JSON list, either perhaps packed with gzip; a parquet file; or in Python a list of dicts or
a data set of Hugging Face's `datasets`.
Out: (place, read) pairs. read() returns the record, or raises ValueError with the place and the reason.

A table has every column in every row, and None where a record lacks the field. So in parquet files and in what Python
brings, None below the top of a record counts as missing. (In JSON a null argument of a tool call is an argument.)

Not here: what the fields of a record mean (examples.py).
"""

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from qlora_lab.files.home import expanded
from qlora_lab.files.strict_json import parse

LARGEST = 2 * 2**30  # bytes that a packed file may unpack to: a few kilobytes can hold any number of zeros
ROWS_AT_ONCE = 1000  # of a parquet file
Placed = tuple[str, Callable[[], Any]]


def records(source: str | Path | Iterable) -> Iterator[Placed]:
    """Yield the place and the reader of each record: "data.jsonl, line 3", or "record 3" of a list; from 1.

    Raises FileNotFoundError for a missing file, and ValueError for one that cannot be read from end to end.
    """
    if isinstance(source, (str, Path)):
        path = expanded(source)
        if not path.is_file():
            raise FileNotFoundError(f'no data file at {path}: give a path to a JSONL or parquet file, or "docstrings"')
        yield from (_of_parquet if path.suffix.lower() == ".parquet" else _of_text)(path)
        return
    if not isinstance(source, Iterable):
        found = type(source).__name__
        raise ValueError(f"data of type {found} cannot be read: give a file, a list of dicts or a data set")
    for number, row in enumerate(source, 1):
        yield f"record {number}", partial(_row, row)


def _row(row: Any) -> Any:
    if not isinstance(row, Mapping):
        return row
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _of_text(path: Path) -> Iterator[Placed]:
    text = _read(path)
    if text.lstrip().startswith("["):
        for number, record in enumerate(parse(text, str(path), line=1, expected="a JSON list"), 1):
            yield f"{path}, record {number}", partial(_same, record)
        return
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() also splits at U+2028, legal in JSON
        if line.strip():
            read = partial(parse, line, str(path), line=number, expected="one JSON object per line")
            yield f"{path}, line {number}", read


def _same(record: Any) -> Any:
    return record


def _read(path: Path) -> str:
    try:
        if path.suffix.lower() == ".gz":
            return _unpacked(path).decode("utf-8-sig")
        return path.read_text(encoding="utf-8-sig")  # -sig: Windows editors add a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error


def _unpacked(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            content = file.read(LARGEST + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:  # EOFError: it was cut off
        raise ValueError(f"{path} cannot be unpacked ({error}): pack it again with gzip, or rename it") from error
    if len(content) > LARGEST:
        raise ValueError(f"{path} unpacks to {_TOO_MUCH}")
    return content


_TOO_MUCH = f"more than {LARGEST / 2**30:g} GiB, the most that is read from a packed file: split it"


def _of_parquet(path: Path) -> Iterator[Placed]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        advice = "pip install 'qlora-lab[parquet]'"
        raise ValueError(f"{path} is a parquet file, and reading one needs pyarrow: {advice}") from error
    number = size = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                size += batch.nbytes
                if size > LARGEST:
                    raise ValueError(f"{path} unpacks to {_TOO_MUCH}")
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, record {number}", partial(_row, row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} cannot be read after record {number} ({reason}): write it again") from error
