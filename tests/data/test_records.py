"""Lists of dicts, data sets of Hugging Face and files give the same examples; each mistake is named with its place."""

import gzip
import json

import pytest

from qlora_lab.data import records
from qlora_lab.data.dataset import encode_all, load_data, usable
from qlora_lab.data.examples import Example, Examples, to_example

ALPACA = {"instruction": "Add.", "output": "4"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
EXAMPLES = [to_example(ALPACA), to_example(CHAT)]


# ----------------------------------------------------------------------------------------------------- lists, data sets


def test_a_list_of_dicts_is_read_as_a_file_of_the_same_records(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(ALPACA)}\n{json.dumps(CHAT)}", encoding="utf-8")
    assert load_data([ALPACA, CHAT]) == load_data((ALPACA, CHAT)) == load_data(path) == EXAMPLES


def test_examples_among_the_records_stay_as_they_are():
    example = Example((("user", "a"), ("assistant", "b")), place="mine")
    read = load_data([example, ALPACA])
    assert read[0] is example and read[1] == EXAMPLES[0]


class DataSet:
    """Rows with every column, None where a record lacks it, as Hugging Face's `datasets` gives them."""

    def __init__(self, *rows: dict):
        names = dict.fromkeys(name for row in rows for name in row)
        self.rows = [{name: row.get(name) for name in names} for row in rows]

    def __iter__(self):
        return iter(self.rows)


def test_a_data_set_fills_missing_fields_with_none():
    assert load_data(DataSet(ALPACA, CHAT)) == EXAMPLES
    assert load_data({"train": DataSet(ALPACA), "test": DataSet(CHAT)}, "test") == EXAMPLES[1:]


def test_a_data_set_with_splits_gives_the_one_that_is_asked_for():
    rows = {"train": [ALPACA], "validation": [CHAT]}
    assert load_data(rows) == EXAMPLES[:1] and load_data(rows, "validation") == EXAMPLES[1:]
    with pytest.raises(ValueError, match="unknown split 'test': there are train, validation"):
        load_data(rows, "test")
    with pytest.raises(ValueError, match="unknown split 'test' of a list or a data set: it has only \"train\""):
        load_data([ALPACA], "test")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([ALPACA, "b"], "record 2: expected a JSON object in the form of .*, found str"),
        ([ALPACA, {}], r"record 2: the record has the keys \(none\)"),
        ([ALPACA, {"instruction": "a", "output": None}], "record 2: 'output' must be text, found null"),
        ([ALPACA, {"instruction": "a", "output": 4.5}], "record 2: 'output' must be text, found 4.5"),
        ([ALPACA, {"instruction": "a", "output": b"c"}], "record 2: 'output' must be text, found b'c'"),
        ([], "there are no examples: give at least one"),
        (7, "data of type int cannot be read: give a file, a list of dicts or a data set"),
        (ALPACA, "unknown split 'train': there are instruction, output; or give a list of dicts"),
    ],
)
def test_what_cannot_be_used_is_named_by_its_number(data, message):
    with pytest.raises(ValueError, match=message):
        load_data(data)


def test_a_text_in_a_table_may_be_empty():
    assert load_data([ALPACA | {"output": ""}])[0].answer == ""


# ---------------------------------------------------------------------------------------------------- packed


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data.jsonl.gz", f"\ufeff{json.dumps(ALPACA)}\r\n\r\n{json.dumps(CHAT)}\r\n"),
        ("data.json.gz", json.dumps([ALPACA, CHAT], indent=1)),
    ],
)
def test_a_file_packed_with_gzip_is_read_as_its_text(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()))
    assert load_data(path) == EXAMPLES


def test_a_mistake_in_a_packed_file_has_its_line(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(f"{json.dumps(ALPACA)}\n\n{{}}".encode()))
    with pytest.raises(ValueError, match=r"data.jsonl.gz, line 3: the record has the keys \(none\)"):
        load_data(path)


PACKED = gzip.compress(json.dumps(ALPACA).encode(), mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(ALPACA).encode(), "data.jsonl.gz cannot be unpacked .*: pack it again with gzip, or rename it"),
        (PACKED[:-9], "data.jsonl.gz cannot be unpacked .*end-of-stream"),
        (PACKED[:-8] + bytes(8), "data.jsonl.gz cannot be unpacked .*CRC"),
        (PACKED[:12] + b"\xff" * 9 + PACKED[21:], "data.jsonl.gz cannot be unpacked"),
        (gzip.compress(b"\xff\xfe", mtime=0), "data.jsonl.gz is not UTF-8 text"),
        (b"", "data.jsonl.gz holds no examples"),
    ],
    ids=["no gzip", "cut", "wrong sum", "damaged", "no text", "empty"],
)
def test_what_is_no_gzip_or_damaged_is_named(tmp_path, content, message):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_data(path)


def test_a_small_file_that_unpacks_to_very_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LARGEST", 1000)
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * 1001))
    with pytest.raises(ValueError, match="unpacks to more than 2 GiB, the most that is read from a packed file"):
        load_data(path)
    path.write_bytes(gzip.compress(json.dumps(ALPACA).ljust(1000).encode()))
    assert load_data(path) == EXAMPLES[:1]


# ------------------------------------------------------------------------------------------------------------- skipped

BAD = ["{", "7", "{}", '{"instruction": "a", "output": null}', '{"messages": [{"role": "critic", "content": "a"}]}']


def test_records_that_cannot_be_used_are_skipped_each_with_its_reason(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([json.dumps(ALPACA), *BAD, json.dumps(CHAT)]), encoding="utf-8")
    with pytest.warns(
        UserWarning, match="5 records were skipped: .*line 2, column 2: it ends.*; .*line 6: unknown role"
    ):
        examples = load_data(path, skip_bad=True)
    assert examples == EXAMPLES and load_data(examples) is examples
    for number, reason in enumerate(examples.skipped, 2):
        assert reason.startswith((f"{path}, line {number}:", f"{path}, line {number}, column"))
    with pytest.raises(ValueError, match="data.jsonl, line 2, column 2: it ends too early"):
        load_data(path)


def test_of_many_skipped_records_a_warning_names_the_first():
    with pytest.warns(UserWarning, match=r"7 records were skipped: record 1: .*; record 5: [^;]*; .*; and 2 more$"):
        assert load_data([*[{}] * 7, ALPACA], skip_bad=True) == EXAMPLES[:1]
    with pytest.warns(UserWarning, match="1 record was skipped: record 2: "):
        load_data([ALPACA, {}], skip_bad=True)


def test_where_every_record_is_bad_nothing_is_skipped():
    with pytest.raises(ValueError, match="none of the 2 records can be used; the first: record 1: the record has"):
        load_data([{}, 7], skip_bad=True)
    with pytest.raises(ValueError, match="there are no examples"):
        load_data([], skip_bad=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [("data.json", b'[{"instruction": 1}, {'), ("data.jsonl.gz", PACKED[:-9])],
    ids=["text", "gzip"],
)
def test_a_file_that_cannot_be_read_to_its_end_is_not_skipped(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*(ends too early|cannot be)"):
        load_data(path, skip_bad=True)


def test_records_that_the_template_refuses_are_skipped_too(tokenizer):
    tokenizer.chat_template = (
        "{% if 'Add' in messages[0].content %}{{ raise_exception('no sums') }}{% endif %}" + tokenizer.chat_template
    )
    examples = load_data([ALPACA, CHAT])
    with pytest.warns(UserWarning, match="1 record was skipped: record 1: the chat template refuses .*no sums"):
        encoded, report = encode_all(Examples(examples, skip_bad=True), tokenizer, 256, progress=False)
    assert (len(encoded), report.kept, len(report.skipped)) == (1, 1, 1)
    with pytest.warns(UserWarning, match="1 record was skipped: record 1: "):
        assert usable(examples, tokenizer) == EXAMPLES[1:]
    for use in (
        lambda few: encode_all(Examples(few, skip_bad=True), tokenizer, 256),
        lambda few: usable(few, tokenizer),
    ):
        with pytest.raises(ValueError, match="none of the 1 records can be used; the first: record 1: .*no sums"):
            use(examples[:1])
