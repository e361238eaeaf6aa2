"""Tables in parquet: rows become records, and what cannot be read is named. Needs pyarrow (the extra "parquet")."""

import json
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet

from qlora_lab.data import records
from qlora_lab.data.dataset import load_data
from tests.data.test_records import ALPACA, CHAT, EXAMPLES


def test_arrow_fills_missing_arguments_with_none():
    """The library under `datasets` gives each tool call the arguments of all others."""
    calls = [
        {"messages": [{"role": "user", "content": "a"}, called(arguments)]} for arguments in ({"a": 1}, {"b": "c"})
    ]
    rows = pa.Table.from_pylist(calls).to_pylist()
    assert rows[0]["messages"][1]["tool_calls"][0]["arguments"] == {"a": 1, "b": None}
    assert load_data(rows) == load_data(calls)


def called(arguments: dict) -> dict:
    return {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": arguments}]}


def as_parquet(path, *rows: dict):
    parquet.write_table(
        pa.Table.from_pylist([{"instruction": None, "output": None, "messages": None} | r for r in rows]), path
    )
    return path


def test_a_parquet_file_is_read_row_by_row(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROWS_AT_ONCE", 2)
    path = as_parquet(tmp_path / "data.parquet", *[ALPACA, CHAT] * 3)
    read = load_data(path)
    assert read == EXAMPLES * 3 and read[4].place == f"{path}, record 5"
    with pytest.raises(ValueError, match="data.parquet, record 4: .*'output' must be text, found null"):
        load_data(as_parquet(path, ALPACA, CHAT, ALPACA, {"instruction": "a"}))


def test_a_parquet_file_that_is_damaged_empty_or_too_large_is_named(tmp_path, monkeypatch):
    path = as_parquet(tmp_path / "data.parquet", ALPACA)
    content = path.read_bytes()
    for damaged in (content[:-9], content[: len(content) // 2], b"", json.dumps(ALPACA).encode()):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="data.parquet cannot be read after record 0 .*: write it again"):
            load_data(path)
    parquet.write_table(pa.table({"instruction": pa.array([], pa.string())}), path)
    with pytest.raises(ValueError, match="data.parquet holds no examples"):
        load_data(path)
    monkeypatch.setattr(records, "LARGEST", 10)
    with pytest.raises(ValueError, match="data.parquet unpacks to more than 2 GiB"):
        load_data(as_parquet(path, ALPACA, CHAT))


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = as_parquet(tmp_path / "data.parquet", ALPACA)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install 'qlora-lab\[parquet\]'"):
        load_data(path)


def test_a_damaged_table_is_not_skipped(tmp_path):
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1PAR1")
    with pytest.raises(ValueError, match="data.parquet cannot be read"):
        load_data(path, skip_bad=True)
