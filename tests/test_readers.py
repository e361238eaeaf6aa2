"""No file can make a reader hang, run away, or fail with an error that does not name it."""

import json
import os
import re
import signal
import warnings
from contextlib import contextmanager

import pytest

from tests.readers import READERS

LENIENT = ("mark", "source note")  # whatever else lies under the name is somebody's own
IN_LINES = ("examples, lines", "examples, list", "results", "log")
TENSORS = ("weights", "adapter")
OBJECTS = [name for name in READERS if name not in (*LENIENT, *IN_LINES, *TENSORS)]
EXCEPTIONAL = {("config.json", "Infinity"), ("config.json, sizes", "Infinity"), ("config.json, model", "Infinity")}


def first(field: bytes):
    """Put a field before the others of the first object."""
    return lambda good: good.replace(b"{", b"{" + field + b", ", 1)


HOSTILE = {
    "empty": (lambda good: b"", "is empty"),
    "blank": (lambda good: b" \n", "is empty"),
    "cut in the middle": (lambda good: good[: len(good) // 2], "ends too early"),
    "cut before its last brace": (lambda good: good.rstrip()[:-1], "ends too early"),
    "more behind it": (lambda good: good + b"{}", r"not JSON \(Extra data\)"),
    "a key that is there twice": (first(b'"a": 1, "a": 2'), "the key 'a' appears twice"),
    "NaN": (first(b'"a": NaN'), "NaN is not JSON"),
    "Infinity": (first(b'"a": -Infinity'), "-Infinity is not JSON"),
    "a number beyond floats": (first(b'"a": 1e999'), "the number '1e999' is too large"),
    "a number of 5,000 digits": (first(b'"a": ' + b"9" * 5000), "a number has too many digits"),
    "half of a surrogate pair": (first(rb'"a": "\ud800"'), r"holds '\\ud800', half of a surrogate pair"),
    "65 lists in one another": (first(b'"a": ' + b"[" * 64 + b"]" * 64), "more than 64 nested lists and objects"),
    "100,000 lists in one another": (first(b'"a": ' + b"[" * 100_000), "more than 64 nested lists and objects"),
    "a byte order mark": (lambda good: b"\xef\xbb\xbf" + good, "begins with a byte order mark"),
    "latin-1": (first('"a": "é"'.encode("latin-1")), "is not UTF-8 text"),
    "UTF-16": (lambda good: good.decode().encode("utf-16-le"), "not JSON|is not UTF-8"),
    "a list": (lambda good: b"[1, 2]", r"holds \[1, 2\]: it must be a JSON object"),
    "null": (lambda good: b"null", "holds None: it must be a JSON object"),
    "a text": (lambda good: b'"abc"', "holds 'abc': it must be a JSON object"),
}


@contextmanager
def seconds(number: int):
    """Whatever takes longer hangs: a FIFO without a writer is waited for without end."""

    def late(*_):
        raise AssertionError(f"this took more than {number} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(number)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(name: str, path) -> str:
    """What the reader says, which is a line that names the file."""
    with seconds(20), pytest.raises(READERS[name].errors) as error:
        READERS[name].read(path)
    said = str(error.value.args[-1] if isinstance(error.value, OSError) and not error.value.filename else error.value)
    assert "\n" not in said and len(said) < 400
    assert path.name in said or name == "quantised tensor"  # which has no file of its own
    return said


@pytest.mark.parametrize("value", ["x", [], True])
@pytest.mark.parametrize("figure", ["perplexity", "bits_per_parameter", "relative_error", "entropy", "block_size"])
def test_a_row_with_a_figure_that_is_none_is_refused(figure, value, tmp_path):
    """The table of the command line, and plots, would fail at it."""
    path = READERS["results"].prepare(tmp_path)
    row = json.loads(path.read_text().splitlines()[0])
    path.write_text(json.dumps(row | {figure: value}) + "\n")
    assert re.search(f"line 1 is not a row of a sweep .*it has {figure}=", refused("results", path))


@pytest.mark.parametrize("name", READERS)
def test_good_files_are_read(name, tmp_path):
    READERS[name].read(READERS[name].prepare(tmp_path))


@pytest.mark.parametrize("damage", HOSTILE)
@pytest.mark.parametrize("name", OBJECTS)
def test_hostile_objects_are_refused_with_the_rule(name, damage, tmp_path):
    change, message = HOSTILE[damage]
    path = READERS[name].prepare(tmp_path)
    path.write_bytes(change(path.read_bytes()))
    if (name, damage) in EXCEPTIONAL:  # older versions of transformers wrote the word into Mamba 2's time_step_limit
        return
    if name == "quantised tensor":  # its errors are those of a checkpoint
        message = "cannot be read: the checkpoint is damaged|is not known here"
    assert re.search(message, refused(name, path))


HARMLESS = ("empty", "blank", "cut before its last brace", "more behind it")  # of a file of lines or a list
HARMLESS += ("half of a surrogate pair",)  # each text that is used is looked at where it is


@pytest.mark.parametrize("damage", [damage for damage in HOSTILE if damage not in HARMLESS])
@pytest.mark.parametrize("name", IN_LINES)
def test_hostile_lines_are_refused_with_their_number(name, damage, tmp_path):
    path = READERS[name].prepare(tmp_path)
    path.write_bytes(HOSTILE[damage][0](path.read_bytes().rstrip()) + b"\n")
    if damage == "a byte order mark" and name != "log":  # Windows editors write one
        return
    if damage == "cut in the middle":
        path.write_bytes(path.read_bytes() + b"{}\n")
    said = refused(name, path)
    assert re.search("line|record|UTF-8", said)


@pytest.mark.parametrize("damage", HOSTILE)
@pytest.mark.parametrize("name", LENIENT)
def test_hostile_files_under_our_names_are_not_ours(name, damage, tmp_path):
    path = READERS[name].prepare(tmp_path)
    path.write_bytes(HOSTILE[damage][0](path.read_bytes()))
    assert READERS[name].read(path) is None


@pytest.mark.parametrize("name", [name for name in READERS if name != "quantised tensor"])
@pytest.mark.parametrize("kind", ["FIFO", "folder", "device", "link to nothing"])
def test_what_is_not_a_regular_file_is_refused_at_once(name, kind, tmp_path):
    path = READERS[name].prepare(tmp_path)
    path.unlink()
    {"FIFO": os.mkfifo, "folder": os.mkdir, "device": to_zero, "link to nothing": to_nothing}[kind](path)
    if name in LENIENT:
        with seconds(20):
            assert READERS[name].read(path) is None
    elif kind == "link to nothing" and name == "results":
        READERS[name].read(path)  # as if there were none
    else:
        refused(name, path)


def to_zero(path):
    path.symlink_to("/dev/zero")


def to_nothing(path):
    path.symlink_to("nothing")


@pytest.mark.parametrize("name", [name for name in READERS if name not in TENSORS and "examples" not in name])
def test_fifty_megabytes_are_refused_unread(name, tmp_path):
    path = READERS[name].prepare(tmp_path)
    good = path.read_bytes()
    with path.open("wb") as file:
        file.write(first(b'"a": "')(good)[: good.index(b"{") + 7])
        file.truncate(140 * 2**20 if name == "tokenizer.json" else 70 * 2**20)  # zeros, which take no room
    if name in LENIENT:
        assert READERS[name].read(path) is None
    elif name != "quantised tensor":  # whose text is in memory already
        assert re.search("MiB, but at most .* are read|more than 16,384 bytes", refused(name, path))


WRONG = [None, True, -1, 0, 10**30, 1.5, -1e300, "x", "", [], ["a"], [1], {}, {"a": 1}, [[]]]


def places(value, place=()):
    """The path of each value in an object; of a list only the first two."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for name, part in inner:
        yield (*place, name)
        yield from places(part, (*place, name))


def variants(content: dict):
    """The object with one value gone, or another in its place."""
    for *parents, last in places(content):
        for value in ["GONE", *WRONG]:
            changed = json.loads(json.dumps(content))
            part = changed
            for parent in parents:
                part = part[parent]
            if value == "GONE":
                del part[last]
            else:
                part[last] = value
            yield changed


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("run's record", "config.json") else pytest.param(name, marks=pytest.mark.slow)
        for name in READERS
        if name not in (*TENSORS, "examples, list")
    ],
)
def test_each_value_of_another_type_is_read_or_refused_by_name(name, tmp_path):
    path = READERS[name].prepare(tmp_path)
    good = path.read_text()
    first, *others = good.splitlines(keepends=True) if name in IN_LINES else [good]
    for changed in variants(json.loads(first)):
        path.write_text(json.dumps(changed) + "\n" + "".join(others))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of rows that lack something, and of sizes of 0
                READERS[name].read(path)
        except READERS[name].errors as error:
            assert path.name in str(error) or name == "quantised tensor", f"{changed}: {error}"
            assert "\n" not in str(error), f"{changed}: {error}"
