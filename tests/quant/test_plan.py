"""A plan survives a file and a power cut, and is checked against its model."""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from qlora_lab.files import disk, lock
from qlora_lab.quant.plan import Candidate, Plan, load_plan

CANDIDATES = tuple(Candidate(name, size, False) for name in ("nf4", "nf3") for size in (32, 128, 512))
NUMEL = (4096, 1024, 1024, 6000)


def plan_of(*candidates):
    """A plan for four layers of one block; one candidate is for all of them."""
    layers = tuple(f"block.{i}" for i in range(len(NUMEL)))
    chosen = candidates if len(candidates) > 1 else candidates * len(NUMEL)
    return Plan("drawn", dict(zip(layers, chosen, strict=True)), 1.25, 4.5, dict(zip(layers, NUMEL, strict=True)))


MIXED = plan_of(*CANDIDATES[:4])


def test_a_plan_is_the_same_from_its_file(tmp_path):
    plan = MIXED
    assert load_plan(plan.save(tmp_path / "plan.json")) == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    stored = json.loads((tmp_path / "plan.json").read_text())
    first = plan.chosen["block.0"]
    assert stored["layers"]["block.0"] == first._asdict() | {"numel": 4096} and stored["model"] == "drawn"


def test_an_interrupted_save_leaves_the_old_plan_and_nothing_else(tmp_path, monkeypatch):
    plan = MIXED
    plan.save(tmp_path / "plan.json")

    def power_cut(*_):
        raise OSError("power cut")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, power_cut)
            with pytest.raises(OSError, match="power cut"):
                plan_of(CANDIDATES[0]).save(tmp_path / "plan.json")
        assert load_plan(tmp_path / "plan.json") == plan
        assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else a power cut could leave an empty file under the name."""
    path, seen = tmp_path / "größer, mit Leerzeichen.json", []

    def sync(handle):
        seen.append((os.fstat(handle).st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", sync)
    MIXED.save(path)
    assert (path.stat().st_size, False) in seen


@pytest.mark.parametrize("content", [b"", b"notes of mine", b"{}", b'{"layers": {}}', b"\xff", b"[1]"])
def test_a_file_that_is_not_a_plan_is_not_replaced(tmp_path, content):
    (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(FileExistsError, match="notes.txt exists and is not a plan, so it is kept: name another"):
        MIXED.save(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_bytes() == content and len(list(tmp_path.iterdir())) == 1


def test_a_plan_follows_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "plan.json").symlink_to(tmp_path / "elsewhere" / "own.json")
    for plan in (plan_of(one) for one in CANDIDATES[:2]):
        assert load_plan(plan.save(tmp_path / "plan.json")) == plan == load_plan(tmp_path / "elsewhere" / "own.json")
    assert (tmp_path / "plan.json").is_symlink() and len(list(tmp_path.rglob("*"))) == 3


def test_two_who_save_at_once_both_succeed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "QUIET", math.inf)  # on a busy machine one may wait until it warns
    plans = [plan_of(one) for one in CANDIDATES]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda plan: plan.save(tmp_path / "plan.json"), plans * 5))
    assert load_plan(tmp_path / "plan.json") in plans and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "is not a plan, or is cut off"),
        (
            lambda text: text.replace('"model"', '"mode"'),
            "plan.json is not a plan, .*has no 'model': it must be",
        ),
        (lambda text: text.replace('"numel": 6000', '"weights": 6000'), "has no 'numel': it must be a whole number"),
        (lambda text: text.replace('"codebook": "nf', '"codebook": "nfx'), r"block\.0: codebook 'nfx\d' is not known"),
        (lambda text: text.replace('"block_size": ', '"block_size": 9'), r"block\.0: block_size=9512 is not allowed"),
        (lambda text: text.replace("false", '"no"'), r"block\.0 has double_quant='no': it must be true or false"),
        (lambda text: text.replace('"numel"', '"zero": 3, "numel"'), r"block\.0 has an unknown entry 'zero'"),
        (
            lambda text: text.replace('"codebook": "nf4"', '"codebook": ["nf4"]'),
            r"has codebook=.*: it must be a text",
        ),
        (
            lambda text: text.replace('"error": ', '"error": "much", "of": '),
            "error=.much.: it must be a number",
        ),
        (
            lambda text: text.replace('"numel": 6000', '"numel": NaN'),
            "plan.json is not a plan, .*NaN is not JSON",
        ),
        (lambda text: "[1, 2]", "plan.json is not a plan"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, change, message):
    path = plan_of(Candidate("nf4", 512, False)).save(tmp_path / "plan.json")
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        load_plan(path)


@pytest.mark.parametrize(
    ("numel", "message"),
    [
        ({"a": 64}, "the plan for tiny names b, neither a linear layer nor experts of this model"),
        ({"a": 64, "b": 32, "c": 8}, "the plan for tiny lacks c, which the model has"),
        ({"a": 64, "b": 8}, "for tiny gives b 32 weights, but the model's layer has 8"),
    ],
)
def test_a_plan_for_another_model_names_the_first_difference(numel, message):
    one = CANDIDATES[0]
    plan = Plan("tiny", {"a": one, "b": one}, 0.0, 4.5, {"a": 64, "b": 32})
    plan.check({"b": 32, "a": 64})
    with pytest.raises(ValueError, match=message):
        plan.check(numel)


def test_what_a_killed_save_left_goes_with_the_next_one(tmp_path):
    plan = MIXED
    (tmp_path / ".plan-personal").mkdir()
    if not (child := os.fork()):
        disk.rename = lambda *_: os._exit(9)
        plan.save(tmp_path / "plan.json")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(tmp_path.iterdir())) == 3
    plan.save(tmp_path / "plan.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".plan-personal", "plan.json"]
