"""Rows of models that see: a stopped call continues on its own models alone. Most runs are faked here."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qlora_lab as ql
from qlora_lab.data.shapes import shapes_split
from qlora_lab.files.checksums import DIFFERS, OK
from qlora_lab.files.results_file import verify_rows
from qlora_lab.measure import seeing_rows as made_rows
from qlora_lab.measure.seeing_rows import RUNS as KNOWN, Settings, seeing_rows
from qlora_lab.train import toy_llava as toy
from qlora_lab.train.toy_llava import toy_llava, trained_tower

SCENES = shapes_split(8, 4).train
TINY = Settings(64, 2, 2, 2, 2, 4)
RUNS = KNOWN[:3]
ALL = [(0, run) for run in RUNS]


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Call seeing_rows, and return the runs that it made. A faked one fails unless it finds those before it."""
    made, stop = [], []

    def process(asked):
        folder, settings, seed, run = json.loads(asked)
        if [seed, run] == stop:
            raise KeyboardInterrupt
        notes = Path(folder, "notes")
        before = notes.read_text("utf-8").splitlines() if notes.exists() else []
        assert before == [f"{settings} {seed} {name}" for name in RUNS[: RUNS.index(run)]]
        Path(folder).mkdir(exist_ok=True)
        notes.write_text("\n".join([*before, f"{settings} {seed} {run}"]), "utf-8")
        made.append((seed, run))
        return 0, json.dumps({"right": {"side": [1, 0]}}), ""

    def call(settings, seeds=1, stop_at=()):
        made.clear()
        stop[:] = stop_at
        try:
            rows = seeing_rows(str(tmp_path), settings, seeds, list(RUNS), progress=False)
        except KeyboardInterrupt:
            return list(made)
        assert [(row["seed"], row["run"]) for row in rows] == [(seed, run) for seed in range(seeds) for run in RUNS]
        assert all(len({row["mark"] for row in rows if row["seed"] == seed}) == 1 for seed in range(seeds))
        return list(made)

    monkeypatch.setattr(made_rows, "_process", process)
    return call


def test_a_run_is_made_once(runs):
    assert runs(TINY) == ALL
    assert runs(TINY) == []
    assert runs(TINY, seeds=2) == [(1, run) for run in RUNS]


def test_a_row_that_was_edited_is_found(runs, tmp_path):
    assert runs(TINY) == ALL
    file = tmp_path / "rows.jsonl"
    assert verify_rows(file)[0].state == OK
    file.write_text(file.read_text("utf-8").replace('"side": [1, 0]', '"side": [1, 1]', 1), "utf-8")
    assert DIFFERS in {part.state for part in verify_rows(file)}


def test_a_stopped_call_goes_on_with_its_own_models(runs):
    assert runs(TINY, stop_at=(0, RUNS[1])) == ALL[:1]
    assert runs(replace(TINY, test=3)) == ALL  # in between, as --quick is
    assert runs(TINY) == ALL[1:]


def test_other_rates_are_other_settings(runs, monkeypatch):
    assert runs(TINY) == ALL
    monkeypatch.setitem(made_rows.RATES, "lora", 1e-5)
    assert runs(TINY) == ALL


@pytest.mark.parametrize("gone", ["folder", "mark"])
def test_without_its_models_a_stopped_call_begins_anew(runs, tmp_path, gone):
    assert runs(TINY, stop_at=(0, RUNS[2])) == ALL[:2]
    (folder,) = tmp_path.glob("*-seed-0")
    shutil.rmtree(folder) if gone == "folder" else (folder / made_rows.MARK).write_bytes(b"\xff\xfe")
    assert runs(TINY) == ALL
    shutil.rmtree(folder)
    assert runs(TINY) == []  # nothing is left to make, so nothing needs it


def test_rows_of_two_folders_are_not_mixed(runs, tmp_path):
    assert runs(TINY, stop_at=(0, RUNS[2])) == ALL[:2]
    shutil.rmtree(next(tmp_path.glob("*-seed-0")))
    assert runs(TINY, stop_at=(0, RUNS[1])) == ALL[:1]
    assert runs(TINY) == ALL[1:]  # the row of the second run is of the folder that is gone


@pytest.mark.parametrize(
    ("code", "errors", "said"),
    [
        (1, "Traceback ...\nMemoryError: too large\n", "MemoryError: too large"),
        (-9, "loading: 100%", "it was killed by signal 9"),
    ],
)
def test_a_run_that_fails_is_named_and_what_was_made_stays(runs, monkeypatch, tmp_path, code, errors, said):
    assert runs(TINY, stop_at=(0, RUNS[1])) == ALL[:1]
    with monkeypatch.context() as patch:
        patch.setattr(made_rows, "_process", lambda _: (code, "", errors))
        with pytest.raises(RuntimeError, match=f"the run 'qlora' of seed 0 failed: {said}. Mend what"):
            seeing_rows(tmp_path, TINY, 1, RUNS, progress=False)
    assert runs(TINY) == ALL[1:]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seeds": 0}, "seeds=0"),
        ({"runs": ["lora"]}, "give RUNS, projector, qlora"),
        ({"runs": ()}, "give RUNS, projector, qlora"),
    ],
)
def test_what_cannot_be_made_is_refused(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        seeing_rows(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"test": -1}, "test=-1"),
        ({"r": 0}, "r=0"),
        ({"batch": "x"}, "batch='x'"),
        ({"pictures": 799}, "read 800 pictures"),
    ],
)
def test_impossible_settings_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Settings(**options)


RUN = """
import sys, time
from qlora_lab.measure import seeing_rows as made_rows
made_rows._measured = lambda *_: {wait}
made_rows.one_run('["folder", {{}}, 0, "lora"]')
"""


@pytest.mark.slow  # an import of the library
def test_a_run_prints_its_row():
    code = RUN.format(wait='{"right": {}}')
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        assert json.loads(run.stdout.read()) == {"right": {}} and run.wait() == 0


@pytest.mark.slow
def test_a_run_ends_with_its_caller():
    left_alone = subprocess.Popen([sys.executable, "-c", RUN.format(wait="time.sleep(600)")], stdin=subprocess.PIPE)
    left_alone.stdin.close()  # as the end of a caller does, whatever ended it
    assert left_alone.wait(timeout=120) == 1


@pytest.fixture
def model(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "PROJECTOR_STEPS", 2)
    tower = trained_tower(SCENES, 1, progress=False)
    llava = toy_llava(tmp_path / "llava", tower, SCENES, language=folder, progress=False)
    return ql.load(llava, None, dtype=torch.float32, device="cpu", progress=False)


@pytest.mark.long
def test_one_part_at_a_time_is_rounded_and_then_put_back(model, monkeypatch):
    monkeypatch.setattr(made_rows, "CODEBOOKS", ("nf2",))
    model, _ = model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def changed():
        return {name.split(".")[1] for name, now in model.state_dict().items() if not torch.equal(now, before[name])}

    answers = made_rows._damaged(model, changed)
    assert answers == {f"{part} in nf2": {part} for part in made_rows.PARTS}
    assert changed() == set()
