"""The reader of JSON: what RFC 8259 has no word for is refused, and an error says where. See test_readers.py."""

import json
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from qlora_lab.files.strict_json import (
    LIST,
    NUMBER,
    OBJECT,
    SWITCH,
    TEXT,
    check_keys,
    each,
    or_null,
    parse,
    read_json,
    whole,
)

VALUES = {"text": "a", "list": [], "object": {}, "switch": True, "whole": 3, "number": 2.5, "null": None}
ALLOWED = [
    (TEXT, {"text"}, "a text"),
    (LIST, {"list"}, "a list"),
    (OBJECT, {"object"}, "a JSON object"),
    (SWITCH, {"switch"}, "true or false"),
    (NUMBER, {"whole", "number"}, "a number"),
    (whole(1), {"whole"}, "a whole number of at least 1"),
    (whole(3, 4000), {"whole"}, "a whole number from 3 to 4,000"),
    (whole(4), set(), "a whole number of at least 4"),
    (whole(0, 2), set(), "a whole number from 0 to 2"),
    (or_null(TEXT), {"text", "null"}, "a text, or null"),
    (each(TEXT), {"object"}, "a JSON object, each value a text"),
]


@pytest.mark.parametrize(("rule", "allowed", "what"), ALLOWED)
def test_a_rule_allows_its_kind_alone(rule, allowed, what):
    assert {name for name, value in VALUES.items() if rule.allows(value)} == allowed and rule.what == what


def test_a_number_fits_into_a_float():
    """Python reads 10^400 as an integer, and float() of it is an OverflowError."""
    assert NUMBER.allows(10**308) and NUMBER.allows(-(10**308))
    assert not any(map(NUMBER.allows, (10**400, -(10**400), float("inf"), float("nan"))))


def test_each_looks_at_the_values():
    assert each(TEXT).allows({"a": "b"}) and not each(TEXT).allows({"a": "b", "c": 1})


def test_keys_are_named_with_their_rule():
    with pytest.raises(ValueError, match="^plan.json has a='x': it must be a whole number of at least 1$"):
        check_keys({"a": "x"}, {"a": whole(1)}, "plan.json")
    with pytest.raises(ValueError, match="^plan.json has no 'a': it must be a text$"):
        check_keys({}, {"a": TEXT}, "plan.json", ("a",))
    check_keys({"b": 1}, {"a": TEXT}, "plan.json")


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ('{"a": 1,\n "b" 2}', None, "f, line 2, column 6: not JSON (Expecting ':' delimiter); expected a JSON object"),
        ('{"a": 1,\n', None, "f, line 2, column 1: it ends too early; expected a JSON object"),
        ('{"a": "bc', None, "f, line 1, column 7: it ends too early; expected a JSON object"),
        ('{"a" 1}', 7, "f, line 7, column 6: not JSON (Expecting ':' delimiter); expected a JSON object"),
        ('{"a": 1, "a": 1}', 7, "f, line 7: the key 'a' appears twice: keep one of them"),
        ('{"a": {"b": 1, "b": 1}}', None, "f: the key 'b' appears twice: keep one of them"),
        ("[-1e999]", None, "f: the number '-1e999' is too large: write one below 1.8e308"),
    ],
)
def test_an_error_says_where(text, line, said):
    with pytest.raises(ValueError) as error:
        parse(text, "f", line=line)
    assert str(error.value) == said


def test_infinity_only_where_it_is_asked_for():
    assert parse("[Infinity, -Infinity]", "f", infinity=True) == [float("inf"), -float("inf")]
    for text, infinity in (("[Infinity]", False), ("[NaN]", True)):
        with pytest.raises(ValueError, match="is not JSON: write a number, or null"):
            parse(text, "f", infinity=infinity)


@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a": ', "}")])
def test_64_in_one_another_and_no_more(opening, closing):
    parse(opening * 63 + "[]" + closing * 63, "f")
    with pytest.raises(ValueError, match="^f: cannot be read: more than 64 nested lists and objects$"):
        parse(opening * 64 + "[]" + closing * 64, "f")


def test_all_json_of_the_library_is_read_here():
    """json.loads stays where no file is read: of the program's own texts, of a child process, of the package's data."""
    library = Path(__file__).parents[2] / "qlora_lab"
    loads = {path.name for path in library.rglob("*.py") if "json.load" in path.read_text("utf-8")}
    assert loads == {"strict_json.py", "run_record.py", "aot.py", "published.py", "lab.py"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@pytest.mark.long
@given(JSON)
def test_all_else_is_what_python_reads(value):
    text = json.dumps(value)
    assert parse(text, "f") == json.loads(text)


@given(st.text() | st.binary().map(lambda content: content.decode("latin-1")))
def test_any_text_is_a_value_or_a_value_error(text):
    try:
        parse(text, "f")
    except ValueError as error:
        assert str(error).startswith("f") and "\n" not in str(error)


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_json(path, largest=8) == {"a": 1}
    with pytest.raises(ValueError, match="a.json has 0.0 MiB, but at most"):
        read_json(path, largest=7)
