"""The whole check: every stage runs whichever fails, and the end says which did."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qlora_lab.kernels import choose, product
from qlora_lab.quant.quantize import quantize
from tests import conftest
from tools import stages
from tools.stages import STAGES, Stage, main


def python(code: str, **environment: str) -> Stage:
    return Stage([sys.executable, "-c", code], environment)


@pytest.fixture
def three(monkeypatch, tmp_path):
    """One stage that passes, one that fails, one that leaves a file with what it found in its environment."""
    write = f"import os; open({str(tmp_path / 'ran')!r}, 'w').write(os.environ['PRETENDED'])"
    pretended = {"good": python("pass"), "bad": python("raise SystemExit(3)"), "last": python(write, PRETENDED="yes")}
    monkeypatch.setattr(stages, "STAGES", pretended)
    return tmp_path / "ran"


def test_a_failure_stops_no_stage_and_is_told_at_the_end(three, capfd):
    assert main([]) == 1
    assert three.read_text() == "yes"
    *_, good, bad, last = capfd.readouterr().out.splitlines()
    assert good.startswith("good        passed") and last.startswith("last        passed")
    assert bad.startswith("bad         FAILED (exit code 3)")


def test_ctrl_c_lets_the_stage_end_and_says_what_was_done(monkeypatch, tmp_path, capfd):
    press = "import os, signal, time; time.sleep(0.3); os.kill(os.getppid(), signal.SIGINT); time.sleep(0.1)"
    slow = python(f"{press}; open({str(tmp_path / 'written')!r}, 'w')")  # pytest reports before it ends
    monkeypatch.setattr(stages, "STAGES", {"good": python("pass"), "slow": slow, "last": python("pass")})
    assert main([]) == 130
    assert (tmp_path / "written").exists()
    *_, good, interrupted = capfd.readouterr().out.splitlines()
    assert good.startswith("good        passed") and interrupted.startswith("slow        interrupted")


def test_stages_are_chosen_by_name(three, capfd):
    assert main(["good"]) == 0
    assert not three.exists() and "last" not in capfd.readouterr().out
    assert main(["good", "fats"]) == 2
    assert "unknown stage 'fats': choose from good, bad, last" in capfd.readouterr().err


def test_each_outcome_of_the_race_has_a_stage():
    from qlora_lab.kernels.product import OVERRIDE, Race

    winners = {stage.environment[OVERRIDE] for stage in STAGES.values() if OVERRIDE in stage.environment}
    assert winners == set(Race._fields)


def test_what_a_test_asks_for_is_seen(calls):
    assert not calls
    quantize(torch.ones(64))
    assert calls == ({"_choose", "run"} if choose("cpu").name == "cpu" else {"_choose"})
    calls.clear()
    product.race()
    assert calls == {"race"}
    calls.clear()  # this file is on the list, too
    subprocess.run([sys.executable, "-c", ""], check=True)
    assert calls == {"process"}


def test_a_file_without_numbers_that_asks_is_missed_in_no_stage():
    """Such files are left out where they differ: conftest.py fails their tests."""
    for call, file, told in [
        ("_choose", "data/test_batches.py", "_choose"),  # by its room
        ("race", "test_architecture.py", "race"),
        ("process", "test_architecture.py", None),
        ("race", "quant/test_quantize.py", None),
        ("race", "train/test_new.py", None),
    ]:
        assert stages.unexpected({call}, stages.ROOT / "tests" / file) == told, file


def test_a_mark_that_its_own_file_does_not_hold_is_refused(tmp_path):
    """--marked would leave the file out of every stage."""
    for name, text in (("test_a.py", "@pytest.mark.slow"), ("test_b.py", "from test_a import slow")):
        (tmp_path / name).write_text(text, "utf-8")
    items = [SimpleNamespace(path=path, get_closest_marker="slow".__eq__) for path in sorted(tmp_path.iterdir())]
    conftest._check_marks(items[:1])
    with pytest.raises(pytest.UsageError, match="^test_b.py: slow: write pytest.mark"):
        conftest._check_marks(items)
    marked = {name: stage.command for name, stage in STAGES.items() if any("--marked" in w for w in stage.command)}
    assert all(f"--marked={name}" in command for name, command in marked.items()) and set(marked) == {"slow", "long"}


def test_rooms_that_compute_with_torch_itself_are_run_whole_on_an_old_cpu():
    tests = stages.ROOT / "tests"
    assert stages.computes_with_torch(tests / "quant" / "test_codebook.py")
    assert not stages.computes_with_torch(tests / "data" / "test_batches.py")
    assert "--asking=_choose,race,run,torch" in STAGES["old"].command


TESTS = """
import functools, os, subprocess, sys, pytest
from qlora_lab.kernels import choose, product

@pytest.fixture(scope="module")
def shared():
    return product.race()

@pytest.mark.parametrize("asks", [True, False])
def test_itself(asks):
    asks and product.race()

def test_before(shared): pass
def test_in_a_child(): subprocess.run([sys.executable, "-c", ""], check=True)
def test_kernels_only(): choose()
def test_that_fails(): assert "AGAIN" in os.environ
def test_that_is_skipped(): "AGAIN" in os.environ or pytest.skip("not yet")
"""


@pytest.mark.slow
def test_the_second_stage_runs_what_has_asked_and_what_is_not_known(tmp_path):
    (tmp_path / "test_a.py").write_text(TESTS, "utf-8")
    cached = "\n@functools.cache\ndef asked_once(): return product.race()\n"  # perhaps for an earlier test
    (tmp_path / "test_b.py").write_text(TESTS + cached, "utf-8")
    # a file that need not even be imported again, and one whose slow test alone is left
    (tmp_path / "test_c.py").write_text("import os\nassert 'AGAIN' not in os.environ\ndef test_c(): pass\n", "utf-8")
    slow = "import pytest\ndef test_d(): pass\n@pytest.mark.slow\ndef test_e(): pass\n"
    (tmp_path / "test_d.py").write_text(slow, "utf-8")
    command = [
        *stages.PYTEST,
        "-p",
        "tests.conftest",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
        "-v",
        f"--rootdir={tmp_path}",
        ".",
    ]
    environment = os.environ | {stages.NOTES: str(tmp_path), "PYTHONPATH": str(stages.ROOT)}

    def passed(*options: str, **more: str) -> set[str]:
        how = {"cwd": tmp_path, "env": environment | more, "capture_output": True, "text": True}
        return set(re.findall(r"^(\S+) PASSED", subprocess.run([*command, *options], **how).stdout, re.M))

    assert len(passed()) == 2 * 5 + 2
    every = {"itself[True]", "itself[False]", "before", "in_a_child", "kernels_only", "that_fails", "that_is_skipped"}
    wanted = {"a": every - {"itself[False]", "kernels_only"}, "b": every}
    found = passed("--asking=race,run", AGAIN="1")
    assert found == {f"test_{file}.py::test_{name}" for file, names in wanted.items() for name in names}


def test_each_list_names_what_exists():
    assert all(
        (stages.ROOT / "tests" / name).exists() for name in [*stages.SAME, *stages.WITHOUT_NUMBERS, *stages.TORCH_ALONE]
    )
    assert set(stages.LONG) <= {path.name for path in (stages.ROOT / "tests").rglob("test_*.py")}


def test_notebooks_are_all_run_and_the_longest_has_both_cores():
    others, longest = STAGES["notebooks"].command, STAGES["fine-tune"].command
    assert "tools.pairs" in others and "notebooks/solutions" in others  # solutions run with them, by their own rules
    assert "-n" not in longest
    run = [Path(part) for part in [*others, *longest] if part.endswith(".ipynb")]
    assert sorted(run) == sorted((stages.ROOT / "notebooks").glob("*.ipynb"))
