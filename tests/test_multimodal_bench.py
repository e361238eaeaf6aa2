"""The bench of models that see: a stopped one continues on its own models alone. Its runs are faked here."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import qlora_lab as ql
from bench import multimodal as bench
from qlora_lab.data.shapes import shapes_split
from qlora_lab.train.seeing import see
from qlora_lab.train.toy_llava import toy_llava, trained_tower

SCENES = shapes_split(8, 4).train
TINY = bench.Settings(64, 2, 2, 2, 2, 4)
RUNS = ("projector", "lora", "damage")
ALL = [(0, run) for run in RUNS]


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Call the bench, and return the runs that it made. A faked one fails unless its folder holds its predecessors."""
    made, stop = [], []

    def child(command, **_):
        folder, settings, seed, run = json.loads(command[-1])
        if [seed, run] == stop:
            raise KeyboardInterrupt
        notes = Path(folder, "notes")
        before = notes.read_text("utf-8").splitlines() if notes.exists() else []
        assert before == [f"{settings} {seed} {name}" for name in RUNS[: RUNS.index(run)]]
        Path(folder).mkdir(exist_ok=True)
        notes.write_text("\n".join([*before, f"{settings} {seed} {run}"]), "utf-8")
        made.append((seed, run))
        return SimpleNamespace(stdout=json.dumps({"right": {"side": [1, 0]}}))

    def call(settings, seeds=1, stop_at=()):
        made.clear()
        stop[:] = stop_at
        try:
            rows = bench.rows_of(tmp_path / "rows.jsonl", tmp_path, settings, seeds, RUNS)
        except KeyboardInterrupt:
            return list(made)
        assert [(row["seed"], row["run"]) for row in rows] == [(seed, run) for seed in range(seeds) for run in RUNS]
        assert all(len({row["mark"] for row in rows if row["seed"] == seed}) == 1 for seed in range(seeds))
        return list(made)

    monkeypatch.setattr(bench.subprocess, "run", child)
    return call


def test_a_run_is_made_once(runs):
    assert runs(TINY) == ALL
    assert runs(TINY) == []
    assert runs(TINY, seeds=2) == [(1, run) for run in RUNS]


def test_a_stopped_bench_goes_on_with_its_own_models(runs):
    assert runs(TINY, stop_at=(0, "lora")) == ALL[:1]
    assert runs(replace(TINY, test=3)) == ALL  # in between, as --quick is
    assert runs(TINY) == ALL[1:]


def test_other_rates_are_other_settings(runs, monkeypatch):
    assert runs(TINY) == ALL
    monkeypatch.setitem(bench.RATES, "lora", 1e-5)
    assert runs(TINY) == ALL


@pytest.mark.parametrize("gone", ["folder", "mark"])
def test_without_its_models_a_stopped_bench_begins_anew(runs, tmp_path, gone):
    assert runs(TINY, stop_at=(0, "damage")) == ALL[:2]
    (folder,) = tmp_path.glob("*-seed-0")
    shutil.rmtree(folder) if gone == "folder" else (folder / bench.MARK).write_text("another's", "utf-8")
    assert runs(TINY) == ALL
    shutil.rmtree(folder)
    assert runs(TINY) == []  # nothing is left to make, so nothing needs it


def test_rows_of_two_folders_are_not_mixed(runs, tmp_path):
    assert runs(TINY, stop_at=(0, "damage")) == ALL[:2]
    shutil.rmtree(next(tmp_path.glob("*-seed-0")))
    assert runs(TINY, stop_at=(0, "lora")) == ALL[:1]
    assert runs(TINY) == ALL[1:]  # the row that "lora" has is of the folder that is gone


@pytest.fixture
def model(folder, tmp_path):
    tower = trained_tower(SCENES, 1, progress=False)
    llava = toy_llava(tmp_path / "llava", tower, language=folder, progress=False)
    return ql.load(llava, None, dtype=torch.float32, device="cpu", progress=False)


@pytest.mark.long
def test_tokens_of_pictures_begin_as_large_as_those_of_words(model):
    model, tokenizer = model
    tokens = []
    model.model.multi_modal_projector.register_forward_hook(lambda *call: tokens.append(call[-1]))
    bench.as_large_as_words(model, SCENES)
    see(model, tokenizer, SCENES, "side", progress=False)
    words = model.get_input_embeddings().weight.std()
    assert not 0.9 * words < tokens[0].std() < 1.1 * words  # or there would be nothing to test
    assert tokens[-1].std() == pytest.approx(words.item(), rel=1e-3)


@pytest.mark.long
def test_one_part_at_a_time_is_rounded_and_then_put_back(model, monkeypatch):
    monkeypatch.setattr(bench, "CODEBOOKS", ("nf2",))
    model, _ = model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def changed():
        return {name.split(".")[1] for name, now in model.state_dict().items() if not torch.equal(now, before[name])}

    answers = bench.damaged(model, changed)
    assert answers == {f"{part} in nf2": {part} for part in bench.PARTS}
    assert changed() == set()
