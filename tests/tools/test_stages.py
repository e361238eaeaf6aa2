"""The whole check: every stage runs whichever fails, and the end says which did."""

import sys
from pathlib import Path

import pytest
import torch

from qlora_lab.kernels import product
from qlora_lab.quant.quantize import quantize
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


def test_a_test_that_asks_for_a_choice_is_missed_in_no_stage(calls):
    """Files said not to ask for kernels or products are left out where they differ: conftest.py notes who asks."""
    assert not calls
    quantize(torch.ones(64))
    assert calls == {"_choose"}
    calls.clear()
    product.race()
    assert calls == {"race"}
    calls.clear()  # this file is on the lists, too
    tests = stages.ROOT / "tests"
    for call, file, told in [
        ("_choose", "data/test_batches.py", "_choose"),  # by its room
        ("race", "test_architecture.py", "race"),
        ("_choose", "quant/test_quantize.py", None),
        ("race", "quant/test_quantize.py", "race"),
        ("race", "train/test_trainer.py", None),
        ("race", "train/test_new.py", None),
    ]:
        assert stages.unexpected({call}, tests / file) == told, file


def test_each_list_names_what_exists():
    assert all((stages.ROOT / "tests" / name).exists() for name in [*stages.SAME, *stages.WITHOUT_PRODUCTS])
    assert set(stages.WITHOUT_NUMBERS) < set(stages.WITHOUT_KERNELS) < set(stages.WITHOUT_PRODUCTS)


def test_notebooks_are_all_run_and_the_longest_is_begun_first():
    command = STAGES["notebooks"].command
    assert "tools.pairs" in command and "notebooks/solutions" in command  # solutions run with them, by their own rules
    first, *others = [Path(part) for part in command if part.endswith(".ipynb")]
    assert first.name == stages.LONGEST
    assert sorted([first, *others]) == sorted((stages.ROOT / "notebooks").glob("*.ipynb"))
