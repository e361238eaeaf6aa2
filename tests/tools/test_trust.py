"""A bounded part of `make trust`: every attack runs, counts, and finds what is broken on purpose."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from tools import trust
from tools.trust import ATTACKS, ROOT, table
from tools.trust_commands import CASES, contents, difference
from tools.trust_trials import Result, Trial, spread

SHARE = "0.02"


def make_trust(*words):
    """Exit code, table and findings of a process of its own: the tests' one has threads, which a fork would lose."""
    command = [sys.executable, str(ROOT / "tools" / "trust.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return done.returncode, done.stdout, done.stderr


def in_a_process_of_its_own(code, *words):
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.slow
def test_every_attack_keeps_its_promises_in_a_bounded_part():
    code, out, err = make_trust("--share", SHARE, "--seed", "1")
    assert code == 0, err
    assert all(attack in out for attack in ATTACKS) and sum(case.name in out for case in CASES) >= 4


@pytest.mark.long
def test_what_breaks_is_counted_and_its_folder_is_kept(tmp_path):
    def good(folder, draws):
        return 3

    def broken(folder, draws):
        (folder / "left").write_text(str(draws.random()))
        raise AssertionError("something is left behind")

    def bug(folder, draws):
        return 1 / 0

    found = list(spread(tmp_path / "a", [Trial("one", good), Trial("one", broken), Trial("two", bug)], seed=5))
    assert sorted(result.count for result in found) == [1, 1, 3]
    failures = {result.name: result for result in found if result.failure}
    assert failures["one"].failure == "something is left behind (seed 5, trial 1)"
    assert "ZeroDivisionError" in failures["two"].failure
    assert (tmp_path / "a" / "1" / "left").exists() and not (tmp_path / "a" / "0").exists()
    list(spread(tmp_path / "b", [Trial("one", good), Trial("one", broken)], seed=5))
    drawn = [(tmp_path / name / "1" / "left").read_text() for name in "ab"]
    assert drawn[0] == drawn[1]  # what a trial draws follows from the seed and its number
    lines = table({"kills": found}, {"kills": 1.0}).splitlines()
    assert lines[1].split() == ["kills", "one", "4", "1"] and lines[-1].split() == [
        "kills",
        "all,",
        "in",
        "1",
        "s",
        "5",
        "2",
    ]


KILLED_INSIDE_TQDM = """
import os, signal
from tqdm.auto import tqdm
from tools.trust_commands import survive_kills_inside_tqdm
{first}
tqdm.get_lock()
child = os.fork()
if not child:
    tqdm.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(child, 0)
signal.alarm(2)
list(tqdm([1], disable=True))
"""


@pytest.mark.slow  # the one that hangs is stopped after two seconds
@pytest.mark.parametrize("first, code", [("", -signal.SIGALRM), ("survive_kills_inside_tqdm()", 0)])
def test_a_kill_inside_tqdm_stops_no_other_process(first, code):
    assert in_a_process_of_its_own(KILLED_INSIDE_TQDM.format(first=first)).returncode == code


HANGS = """
import sys, time
from contextlib import contextmanager
from pathlib import Path
from qlora_lab import cli
from tools import trust_commands
trust_commands.LIMIT = 0.2
@contextmanager
def a_lock_that_never_comes():
    yield time.sleep(60)
code, words = trust_commands.run(None, ["--help"], Path(sys.argv[1]) / "out", a_lock_that_never_comes)
sys.exit(words if code == 1 else code)
"""


def test_a_command_that_hangs_says_where(tmp_path):
    words = in_a_process_of_its_own(HANGS, str(tmp_path)).stderr
    assert "Timeout" in words and "a_lock_that_never_comes" in words


@pytest.mark.slow
def test_ctrl_c_and_sigterm_leave_no_folder(tmp_path):
    """SIGTERM comes to the first process alone. One that comes while Python forks is lost: a user sends another."""
    command = [sys.executable, str(ROOT / "tools" / "trust.py"), "kills", "--share", "0.05"]
    for sent in (signal.SIGINT, signal.SIGTERM):
        running = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"TMPDIR": str(tmp_path)})
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("*/references")) and time.monotonic() < deadline:
            time.sleep(0.05)
        while running.poll() is None and time.monotonic() < deadline:
            running.send_signal(sent)
            with suppress(subprocess.TimeoutExpired):
                running.wait(2)
        assert running.wait(1) != 0  # 1 where a command that was tried in this very process was stopped
        assert not list(tmp_path.glob("qlora-lab-trust-*"))


def test_what_is_left_behind_missing_or_changed_is_named(tmp_path):
    for name, seconds in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        for file in ("result.json", "log.jsonl"):
            (tmp_path / name / file).write_text(json.dumps({"loss": 1, "seconds": seconds}))
    whole = contents(tmp_path / "a")
    assert difference(contents(tmp_path / "b"), whole) == ""  # times do not count
    (tmp_path / "b" / ".scratch").mkdir()
    assert difference(contents(tmp_path / "b"), whole) == ".scratch is left behind"
    (tmp_path / "b" / ".scratch").rmdir()
    (tmp_path / "b" / "log.jsonl").write_text('{"loss": 2, "seconds": 1}\n')
    assert difference(contents(tmp_path / "b"), whole) == "log.jsonl differs"
    (tmp_path / "b" / "log.jsonl").unlink()
    assert difference(contents(tmp_path / "b"), whole) == "log.jsonl is missing"


def test_an_exit_code_says_whether_a_promise_was_broken(monkeypatch, capsys, tmp_path):
    class Home:
        def __init__(self, folder):
            self.folder = folder

        def warm(self):
            pass

    monkeypatch.setattr("tools.trust_commands.Home", Home)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its own
    for failure, code in (("", 0), ("is lost (seed 0, trial 1)", 1)):
        monkeypatch.setattr(trust, "results_of", lambda *_, failure=failure: [Result("x", 1, failure, str(tmp_path))])
        assert trust.main(["kills"]) == code
        assert ("x: is lost (seed 0, trial 1); see" in capsys.readouterr().err) == bool(failure)


def test_the_page_of_promises_names_tests_and_attacks_that_exist():
    page = (ROOT / "docs" / "trust.md").read_text("utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}" in (ROOT / file).read_text("utf-8"), f"{file}::{test}"
    assert set(re.findall(r"`make trust \((\w+)\)`", page)) == set(ATTACKS)


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.stem)
def test_importing_a_tool_changes_no_environment(path):
    """numba refuses all work once NUMBA_NUM_THREADS has changed under it."""
    before = dict(os.environ)
    runpy.run_path(str(path), run_name="imported")
    after = dict(os.environ)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    # torch's compiler names its cache there when it is first imported, and later work finds the same one
    assert changed <= {"TORCHINDUCTOR_CACHE_DIR"}
