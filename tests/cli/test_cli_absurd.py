"""Absurd values of options: every option of every command, walked from the parser, so that new ones are covered."""

import argparse
from functools import cache

import pytest

import qlora_lab as ql
from qlora_lab import cli
from qlora_lab.cli import options
from qlora_lab.export import gguf_out, merge_folders
from qlora_lab.measure import in_place, sensitivity
from qlora_lab.measure.best_plan import check_limits
from qlora_lab.memory.setup import Setup
from qlora_lab.model import fetch, load as models, quantized_folder
from qlora_lab.train.settings import Settings

ABSURD = ["nan", "inf", "-inf", "-1", "0", "1e400", str(10**30), "", " ", "１２", "1_000", "9" * 5000, "x\x1b[2J"]
# Fitting numbers for an option: 0 is one of these, and 2^63 - 1 fits seeds alone.
MAY_BE_0 = {"held_out", "warmup_steps", "eval_every", "patience", "save_every", "seed", "share_below", "dropout"}
MAY_BE_0 |= {"learned", "shots", "pictures", "temperature"}
MAY_BE_HUGE = {"clip", "bits"}  # 10^30: no limit
CHOICES = {"codebook", "codebooks", "schedule", "method", "dtype", "adapter_dtype", "device", "double_quant"}
CHOICES |= {"sass", "ptx", "rungs", "backend"}
# Names, texts and paths: free, as long as nothing is there that they would have to fit.
FREE = {"model", "question", "data", "test_data", "out", "text", "plan", "adapter", "folder", "notebooks", "targets"}
FREE |= {
    "also",
    "parts",
    "original",
    "file",
    "other",
    "source",
    "start",
    "games",
    "adapters",
    "judge_model",
    "pictures",
    "hosted",
}
SWITCHES = (argparse._StoreTrueAction, argparse._StoreFalseAction, argparse._HelpAction, argparse._VersionAction)
NUMERIC = (options.whole, options.number, options.size, options.levels)


@cache
def commands() -> dict[str, argparse.ArgumentParser]:
    (sub,) = (a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return sub.choices


def settable(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if not isinstance(action, SWITCHES)]


ALL = [(name, action) for name, parser in commands().items() for action in settable(parser)]
WITH_NUMBERS = [(name, action) for name, action in ALL if action.type in NUMERIC]
WITH_CHOICES = [(name, action) for name, action in ALL if action.dest in CHOICES]


@pytest.mark.parametrize("command, action", ALL, ids=lambda value: getattr(value, "dest", value))
def test_every_option_is_of_a_kind_that_is_tested_here(command, action):
    # str: a text, where ~ is not a folder
    assert action.type in (None, str, *NUMERIC), "numbers are read by qlora_lab/cli/options.py, strictly"
    assert action.type or action.dest in CHOICES | FREE or action.choices, "is it a choice, or free?"


def some_slow(options: list) -> list:
    """The same; those of finetune and quantize are in the fast tests."""
    return [
        pytest.param(command, action, marks=() if command in ("finetune", "quantize") else pytest.mark.slow)
        for command, action in options
    ]


def words(command: str, action: argparse.Action, value: str) -> list[str]:
    """A command line with this one option, and whatever the command needs besides."""
    needed = []
    for other in settable(commands()[command]):
        if other.required and other is not action and other.nargs != "*":
            text = "llama-7b" if command == "memory" else "nowhere"
            needed += [*other.option_strings[-1:], "4.5" if other.type else text]
    if command == "tournament" and action.type:  # a model is needed where no --games are named
        needed = ["nowhere", "--out", "nowhere"]
    many = 2 if action.nargs == 2 else 1
    if not action.option_strings:
        return [command, *([value] if action.dest in CHOICES else needed)]
    glued = [f"{action.option_strings[-1]}={value}"] if many == 1 else [action.option_strings[-1], value, value]
    return [command, *needed, *glued]


@pytest.fixture
def no_model(monkeypatch, tmp_path):
    """Whoever asks for a model, or leaves a file, has gone too far."""

    def load(*args, **kwargs):
        raise AssertionError("a model is asked for")

    monkeypatch.chdir(tmp_path)
    # all that import it: a first import now would keep `load`
    for home in (fetch, models, quantized_folder, in_place, sensitivity, merge_folders, gguf_out):
        monkeypatch.setattr(home, "resolve", load)
    monkeypatch.setattr(ql, "fetch", load, raising=False)
    monkeypatch.setattr(ql, "load_data", lambda *args, **kwargs: [object()], raising=False)
    yield tmp_path
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def refused(capsys, argv: list[str]) -> str:
    """What is said of it: one line, and exit code 2."""
    try:
        code = cli.main(argv)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and not out, (argv, out, err)
    (line,) = err.splitlines()
    assert line.startswith("qlora-lab ") and line.isprintable() and len(line) < 700, line
    return line


def named(action: argparse.Action, line: str) -> bool:
    """Whether the option, or the setting of the same name, is in the line."""
    names = {action.dest, action.dest.replace("_", "-"), action.dest.removesuffix("s"), action.metavar}
    names |= {"max_length": {"length"}, "gpu": {"gpu_gb"}, "bits": {"bits_per_parameter"}}.get(action.dest, set())
    names |= {"block_size"} if action.dest == "block_sizes" else set()
    names |= {"rung"} if action.dest in ("rungs", "sass", "ptx") else set()
    return any(isinstance(name, str) and name.lower() in line.lower() for name in names)


@pytest.mark.parametrize("command, action", some_slow(WITH_NUMBERS), ids=lambda value: getattr(value, "dest", value))
def test_an_absurd_number_is_named_before_a_model_is_loaded(capsys, no_model, command, action):
    for value in ABSURD:
        if (value == "0" and action.dest in MAY_BE_0) or (value == str(10**30) and action.dest in MAY_BE_HUGE):
            continue
        line = refused(capsys, words(command, action, value))
        assert named(action, line), line


@pytest.mark.parametrize("command, action", WITH_CHOICES, ids=lambda value: getattr(value, "dest", value))
def test_an_absurd_choice_is_named_before_a_model_is_loaded(capsys, no_model, command, action):
    for value in ("", "nan", "-1", "１２", "x\x1b[2J", "NF4 ", "9" * 5000):
        line = refused(capsys, words(command, action, value))
        assert named(action, line), line


@pytest.mark.parametrize("text", ["\x1b[2J", "\x07", "\ud800"])
def test_what_a_terminal_acts_on_is_spelled_out(capsys, text):
    assert ascii(text)[1:-1] in refused(capsys, ["fetch", text])


# --------------------------------------------------------------------------------------------------------- the library

HALF, INFINITE = 0.5, float("inf")
HOSTILE = [None, "1", -1, HALF, float("nan"), INFINITE, 10**400, True, [], b"1"]
WHOLE = ["steps", "batch_size", "micro_batch_size", "max_length", "warmup_steps", "eval_every", "patience"]
WHOLE += ["save_every", "keep", "seed", "optimizer_budget", "optimizer_bits"]
ON_OR_OFF = ["packing", "group_by_length", "shard", "expert_parallel"]
MAY_BE_NONE = {"micro_batch_size", "optimizer_budget"}


@pytest.mark.parametrize("name", [*WHOLE, "lr", "clip", "schedule", *ON_OR_OFF])
def test_settings_refuse_what_is_no_setting(name):
    fits = [None] * (name in MAY_BE_NONE) + [True] * (name in ON_OR_OFF)
    fits += [HALF] * (name in ("lr", "clip"))
    for value in HOSTILE:
        if not any(value is fit for fit in fits):
            with pytest.raises(ValueError, match=rf"^{name}=.{{1,60}} is not (allowed|known): ") as error:
                Settings(**{name: value})
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["r", "batch_size", "length", "micro_batch_size", "mean_length", "optimizer_bits"])
def test_a_setup_of_memory_refuses_what_is_no_number(name):
    for value in [*HOSTILE, 10**30]:
        if value is not None or name not in ("micro_batch_size", "mean_length"):
            with pytest.raises(ValueError, match=f"^{name}="):
                Setup(**{name: value})


CALLS = {
    "gpu_gb": lambda value: ql.fit("llama-7b", value),
    "learned": lambda value: Setup(learned=value),
    "dropout": lambda value: Setup(dropout=value),
    "bits_per_parameter": check_limits,
    "constants_share": lambda value: check_limits(4.5, "x" if value is None else value),
    "r": lambda value: ql.add_lora(tiny(), r=value),
    "alpha": lambda value: ql.add_lora(tiny(), alpha=value),
    "seed": lambda value: ql.add_lora(tiny(), seed=value),
    "max_new_tokens": lambda value: ql.generate(embedder(), len, "hi", value),
    "length": lambda value: ql.perplexity(embedder(), len, "text", length=value),
    "windows": lambda value: ql.perplexity(embedder(), len, "text", windows=value),
    "block_size": lambda value: ql.load("nowhere", block_size=value),
}


def tiny():
    import torch

    return torch.nn.Sequential(torch.nn.Linear(4, 4))


def embedder():
    """Looks like a language model until it is used."""
    model = tiny()
    model.get_input_embeddings = lambda: model[0]
    return model


@pytest.mark.parametrize("name", CALLS)
def test_public_functions_refuse_what_is_no_number(name):
    fits = {"gpu_gb": [HALF], "learned": [HALF], "dropout": [HALF], "constants_share": [HALF], "alpha": [HALF]}
    fits["bits_per_parameter"] = [HALF, INFINITE]  # no limit
    for value in HOSTILE:
        if not any(value is fit for fit in fits.get(name, ())):
            with pytest.raises((ValueError, TypeError), match=f"^{name}=.{{1,60}} (is not allowed|must be a whole)"):
                CALLS[name](value)
