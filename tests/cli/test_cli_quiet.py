"""--quiet draws no bar, whichever command; progress=False draws none in the library."""

import ast
from pathlib import Path

import pytest

import qlora_lab as ql
from qlora_lab import cli
from qlora_lab.adapters.lora import add_lora
from qlora_lab.data import docstrings
from tests.data.test_choice_files import small_questions

ROOM = Path(cli.__file__).parents[1]
SMALL = ["--windows", "2", "--length", "10"]
TRAINED = ["--data", "DATA", "--r", "2"]
COMMANDS = {
    "finetune": [
        *TRAINED,
        "--test-data",
        "DATA",
        "--held-out",
        "2",
        "--steps",
        "2",
        "--eval-every",
        "1",
        "--out",
        "OUT",
    ],
    "generate": ["double 3", "--max-new-tokens", "2"],
    "doctor": TRAINED,
    "quantize": ["MODEL", "--out", "OUT"],
    "merge": ["MODEL", "--adapter", "ADAPTER", "--anyway", "--out", "OUT"],
    "sweep": ["MODEL", "--out", "OUT", *SMALL],
    "tournament": ["MODEL", "--questions", "2", "--max-new-tokens", "2", "--out", "OUT"],
    "block-size": ["MODEL", "--bits", "5", "--out", "OUT", *SMALL],
    "multiple-choice": ["MODEL", "--out", "OUT", "--data", "QUESTIONS", "--shots", "1"],
    "memory": ["MODEL"],
    "xray": ["MODEL"],
}
pytestmark = pytest.mark.usefixtures("one_thread")


def adapter(folder, tmp_path):
    """One that was just begun."""
    model, _ = ql.load(folder, progress=False)
    return ql.save_adapter(ql.add_lora(model, r=2), tmp_path / "trained")


@pytest.fixture
def shown(capsys, tmp_path, folder, monkeypatch):
    """What a command writes to stderr."""
    text = "the sum of the two numbers is a number. " * 9
    for name in ("qlora_lab.measure.perplexity.topics_text", "qlora_lab.measure.sweep.topics_text"):
        monkeypatch.setattr(name, lambda: text, raising=False)
    data = tmp_path / "train.jsonl"
    data.write_text("".join(f'{{"instruction": "double {i}", "output": "{2 * i}"}}\n' for i in range(12)))
    names = {"DATA": data, "MODEL": folder, "OUT": tmp_path / "out", "ADAPTER": adapter(folder, tmp_path)}
    names["QUESTIONS"] = small_questions(tmp_path / "questions")

    def run(command, *options):
        argv = [str(names.get(word, word)) for word in COMMANDS[command]]
        if command in ("finetune", "generate", "doctor"):
            argv += ["--model", str(folder)]
        capsys.readouterr()  # what saving the model said
        assert cli.main([command, *argv, *options]) == 0
        return capsys.readouterr().err

    return run


@pytest.mark.long
@pytest.mark.parametrize("command", COMMANDS)
def test_a_quiet_command_shows_no_progress(shown, command):
    assert shown(command, "--quiet") == ""


def test_the_help_of_quiet_says_what_it_leaves_out(capsys):
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--help"])
    assert "print only results: no progress bars, no notes" in " ".join(capsys.readouterr().out.split())


@pytest.mark.long
@pytest.mark.parametrize("command, bars", [("finetune", ["training", "held-out loss", "answers", "tokens", "loading"])])
def test_others_do(shown, command, bars):
    err = shown(command)
    assert all(f"{bar}:" in err for bar in bars)


def test_other_processes_than_the_first_are_quiet(shown, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert shown("generate") == ""


def test_reading_docstrings_is_silent_when_asked(capsys, monkeypatch):
    monkeypatch.setattr(docstrings, "_READ", {})
    docstrings.docstring_pairs(["tqdm"], progress=False)
    assert capsys.readouterr().err == ""


def test_training_on_docstrings_is_silent_when_asked(capsys, monkeypatch, tiny_llama, tokenizer, tmp_path):
    monkeypatch.setattr(docstrings, "_READ", {})
    monkeypatch.setattr(docstrings, "TRAIN", ["tqdm"])
    monkeypatch.setattr(docstrings, "TEST", [])
    options = {"steps": 1, "batch_size": 1, "max_length": 1024, "progress": False}
    ql.finetune(add_lora(tiny_llama, r=2), tokenizer, "docstrings", out=tmp_path / "run", **options)
    assert docstrings._READ and capsys.readouterr().err == ""


@pytest.mark.long
def test_each_bar_can_be_switched_off():
    """Where `disable` is left out, a bar is drawn whatever was asked."""
    always = [
        f"{path.name}, line {node.lineno}"
        for path in sorted(ROOM.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "tqdm"
        if "disable" not in [keyword.arg for keyword in node.keywords]
    ]
    assert always == []
