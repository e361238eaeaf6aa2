"""Damaged inputs for every parser: a bounded part of tools/fuzz.py; and that it finds what it is made to find."""

from random import Random

import pytest

from qlora_lab.cli.options import one_line
from tools import fuzz
from tools.fuzz_damage import in_json, in_lines, in_numbers, in_safetensors, in_words
from tools.fuzz_parsers import PARSERS, Parser

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 3000  # in about three seconds of one processor


@pytest.mark.slow
def test_damaged_inputs_are_read_or_refused_as_documented(monkeypatch, tmp_path):
    monkeypatch.setattr(fuzz, "SECONDS", 60)  # a busy machine is no finding
    tallies = fuzz.fuzz(list(PARSERS), COUNT, 16, tmp_path, workers=1)
    assert not [str(finding) for tally in tallies.values() for finding in tally.findings]
    assert tallies.keys() == PARSERS.keys()
    drawn, read = (sum(part) for part in zip(*((one.count, one.read) for one in tallies.values()), strict=True))
    assert drawn >= COUNT and drawn / 20 < read < drawn / 2  # damage that all or none survive finds nothing


# ---------------------------------------------------------------------------------------------------------- the driver


def broken(read, errors=(ValueError,)):
    return Parser(lambda folder: [b'{"a": [1, 2]}', b"[3]"], read, errors, in_json)


def fails_on(byte, error):
    def read(content, folder):
        if byte in content:
            raise error

    return read


def sleeps(content, folder):
    while b"[3" not in content:
        pass


FAULTS = {
    "another exception": (fails_on(b"NaN", TypeError("a\nb")), "TypeError at test_fuzz.py:"),
    "a KeyError that is not documented": (fails_on(b"NaN", KeyError("a")), "KeyError at test_fuzz.py:"),
    "a message of two lines": (fails_on(b"NaN", ValueError("a\nb")), "ValueError at test_fuzz.py:"),
    "no message": (fails_on(b"NaN", ValueError()), "ValueError at test_fuzz.py:"),
    "a novel": (fails_on(b"NaN", ValueError("word " * 999)), "ValueError at test_fuzz.py:"),
    "an exit": (fails_on(b"NaN", SystemExit(0)), "SystemExit at test_fuzz.py:"),
    "no memory": (fails_on(b"NaN", MemoryError()), "MemoryError at test_fuzz.py:"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_promise_is_found_and_can_be_had_again(monkeypatch, tmp_path, fault):
    read, said = FAULTS[fault]
    monkeypatch.setitem(fuzz.PARSERS, "broken", broken(read))
    tally = fuzz.attack("broken", tmp_path / "a", 300, "5")
    assert tally.count == 300 and tally.findings and tally.read
    for finding in tally.findings:
        assert b"NaN" in finding.content and finding.fault.startswith(said)
        assert finding.content.hex()[:100] in str(finding) and "seed '5'" in str(finding)
        assert fuzz.outcome(PARSERS["broken"], finding.content, tmp_path) == ("finding", finding.fault)
    assert fuzz.attack("broken", tmp_path / "b", 300, "5") == tally  # the same seed draws the same


def test_what_takes_for_ever_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(fuzz, "SECONDS", 0.02)
    assert fuzz.outcome(broken(sleeps), b"[4]", tmp_path)[1].startswith("TooLongError at test_fuzz.py:")
    assert fuzz.outcome(broken(sleeps), b"[3]", tmp_path) == ("read", "")


@pytest.mark.slow  # it forks a process with 4 GiB of address space
def test_two_processes_count_together_and_a_dead_one_is_a_finding(monkeypatch, tmp_path):
    monkeypatch.setitem(fuzz.PARSERS, "fine", broken(fails_on(b"NaN", ValueError("no"))))
    tallies = fuzz.fuzz(["fine"], 400, 0, tmp_path / "a")
    assert tallies["fine"].count == 400 and not tallies["fine"].findings
    assert fuzz.table(tallies).splitlines()[-1].split()[:2] == ["all", "400"]
    monkeypatch.setitem(fuzz.PARSERS, "dies", broken(lambda content, folder: __import__("os")._exit(9)))
    tallies = fuzz.fuzz(["fine", "dies"], 400, 0, tmp_path / "b")
    assert [finding.fault for finding in tallies["dies"].findings] == ["the process ended with 9 in dies"] * 2


GOOD = {
    in_json: b'{"a": [1, {"b": "c"}], "d": null}',
    in_lines: b'{"a": 1}\n{"b": [2]}\n',
    in_words: b"memory\0llama-7b\0--gpu\x0024",
    in_numbers: bytes(range(64)),
    in_safetensors: b'6\0\0\0\0\0\0\0{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}' + bytes(8),
}


@pytest.mark.parametrize("damage", GOOD, ids=lambda damage: damage.__name__)
def test_damage_is_of_many_kinds_and_the_same_for_the_same_draws(damage):
    found = [damage(GOOD[damage], Random(i)) for i in range(200)]
    assert found == [damage(GOOD[damage], Random(i)) for i in range(200)]
    assert len(set(found)) > 60
    assert all(isinstance(damage(rubbish, Random(0)), bytes) for rubbish in (b"{", b"\xff" * 20, b"1"))


def test_one_line_is_for_a_terminal():
    assert one_line("a\nb\t\x1b[2J \ud800 " + "x" * 5000) == r"a b \x1b[2J \ud800 " + "x" * 250 + "..."
