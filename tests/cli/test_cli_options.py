"""Each option has one home: its default and its help text are those of a dataclass, and Python's functions agree."""

import argparse
import ast
import inspect
import json
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest

import qlora_lab as ql
from qlora_lab import cli
from qlora_lab.adapters.add_adapter import LORA, MAKERS, METHODS
from qlora_lab.cli.memory import NOT_OPTIONS
from qlora_lab.memory.setup import Setup
from qlora_lab.train.check_run import check_run
from qlora_lab.train.run_options import METHOD_OPTIONS, AdapterOptions, DataOptions, ModelOptions, OutputOptions
from qlora_lab.train.settings import Settings
from tests.test_architecture import HEAVY

RUN = (ModelOptions, DataOptions, Settings, AdapterOptions, OutputOptions)
OWNERS = {"finetune": RUN, "doctor": RUN, "generate": (ModelOptions,), "quantize": (ModelOptions,), "memory": (Setup,)}
OWNERS["merge"] = OWNERS["chat"] = (ModelOptions,)
OF_THE_COMMAND = {"help", "json", "quiet", "gpu", "question", "adapter", "max_new_tokens", "plan", "target"}
OF_THE_COMMAND |= {"original", "anyway", "pictures", "compare", "machine"}
OF_THE_COMMAND |= {"temperature", "top_p", "repetition_penalty", "seed", "stop", "cache_bits", "int8"}


def options(command: str) -> dict[str, argparse.Action]:
    (commands,) = (a for a in cli.build_parser([command])._actions if isinstance(a, argparse._SubParsersAction))
    return {action.dest: action for action in commands.choices[command]._actions}


def field_of(command: str, dest: str):
    homes = [owner.__dataclass_fields__.get(dest) for owner in OWNERS[command]]
    (home,) = filter(None, homes)  # one, and one only
    return home


@pytest.mark.parametrize("command", OWNERS)
def test_defaults_and_help_texts_are_those_of_the_dataclasses(command):
    for dest, action in options(command).items():
        positional = not action.option_strings
        if dest in OF_THE_COMMAND or (command == "memory" and dest == "model"):
            continue
        # a copy has no usual place, a run has; doctor's is the report of a machine
        if command in ("quantize", "merge", "doctor") and dest == "out":
            continue
        field = field_of(command, dest)
        assert positional or action.default == field.default
        assert action.help.removeprefix("do not ") == field.metadata["help"]


@pytest.mark.parametrize("owner", RUN)
def test_every_field_of_a_run_is_an_option_of_finetune(owner):
    assert {field.name for field in fields(owner)} <= options("finetune").keys()


def test_every_field_of_a_setup_is_an_option_or_deliberately_none():
    names = [field.name for field in fields(Setup)]
    assert set(names) - options("memory").keys() == set(NOT_OPTIONS)


@pytest.mark.parametrize("owner", [*RUN, Setup])
def test_the_docstring_repeats_each_help_text(owner):
    for field in fields(owner):
        if field.metadata:
            assert f"`{field.name}` ({field.default!r}): {field.metadata['help']}" in inspect.getdoc(owner)


RENAMED = {"name_or_path": "model"}  # of load; everything else has one name


@pytest.mark.parametrize("name", ["load", "quantize_folder", "add_lora", "finetune"])
def test_functions_have_the_defaults_of_the_dataclasses(name):
    compared = 0
    homes = {field.name: field for owner in RUN for field in fields(owner)}
    for parameter in inspect.signature(getattr(ql, name)).parameters.values():
        field = homes.get(RENAMED.get(parameter.name, parameter.name))
        # dtype: "auto" is None, and held_out are the examples themselves
        if field and parameter.default is not parameter.empty and parameter.name not in ("dtype", "held_out"):
            assert parameter.default == field.default, parameter
            compared += 1
    assert compared >= 3


def help_texts() -> list[str]:
    """Every literal that is a help text: of `option` in a dataclass, or `help=` in a command."""
    texts = []
    for path in sorted(Path(ql.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                of_a_field = getattr(node.func, "id", "") == "option"
                texts += [a.value for a in node.args[1:2] if of_a_field and isinstance(a, ast.Constant)]
                keywords = [k.value for k in node.keywords if k.arg == "help"]
                texts += [value.value for value in keywords if isinstance(value, ast.Constant)]
    return texts


@pytest.mark.long
def test_each_help_text_has_one_home():
    texts = help_texts()
    assert len(texts) > 60
    assert [text for text, count in Counter(texts).items() if count > 1] == []
    assert not [text for text in texts if text.endswith(".")]


def test_a_text_that_says_its_default_in_words_is_not_followed_by_another():
    for command in cli.COMMANDS:
        for action in options(command).values():
            if "(default: " in (action.help or ""):
                assert action.default is None


@pytest.mark.long
def test_help_loads_nothing_heavy():
    """Of all commands: without one, their parsers are made together."""
    code = "import json, sys; from qlora_lab import cli; cli.build_parser(); print(json.dumps(list(sys.modules)))"
    modules = json.loads(subprocess.check_output([sys.executable, "-c", code], text=True))
    assert not set(modules) & {*HEAVY, "tokenizers", "safetensors", "gguf"}


CHECKPOINTED, PACKED = Settings(gradient_checkpointing=True), Settings(packing=True)
PLUS, SHARD = Settings(lora_plus=16), Settings(shard=True)


@pytest.mark.parametrize(
    "model, adapter, others, message",
    [
        ({"codebook": "nf9"}, {}, {}, "codebook 'nf9' is not known"),
        ({"block_size": 7}, {}, {}, "block_size=7 is not allowed"),
        ({}, {"r": 0}, {}, "r=0 is not allowed"),
        ({}, {"alpha": -1}, {}, "alpha=-1 is not allowed"),
        ({}, {"method": "houlsby", "size": 0}, {}, "size=0 is not allowed"),
        ({}, {"method": "prompt", "virtual_tokens": 0}, {}, "virtual_tokens=0 is not allowed"),
        ({}, {"method": "prefix", "mlp": 0}, {}, "mlp=0 is not allowed"),
        ({}, {"method": "ia3"}, {}, "method is 'ia3', but it must be one of lora, rslora, dora, pissa, loftq, full"),
        ({}, {"method": "houlsby", "r": 8}, {}, "r is no option of method houlsby: its options are size"),
        ({}, {"size": 8}, {}, "size is no option of method lora: its options are r, alpha"),
        ({}, {"method": "bitfit", "targets": "q_proj"}, {}, "targets is no option of method bitfit: it has none"),
        ({}, {"source": "m"}, {}, "source is no option of method lora: its options are r, alpha"),
        ({}, {"method": "prefix"}, {"settings": CHECKPOINTED}, "method prefix cannot checkpoint gradients"),
        ({}, {"method": "prefix"}, {"settings": PACKED}, "method prefix cannot train on packed rows"),
        ({}, {"method": "prompt"}, {"settings": PACKED}, "method prompt cannot train on packed rows"),
        ({}, {"method": "houlsby"}, {"settings": PLUS}, "lora_plus=16 is for lora_B, but method houlsby has none"),
        ({"codebook": "none"}, {"method": "full"}, {"settings": SHARD}, "method full freezes none"),
        ({}, {"dropout": 1.0}, {}, "dropout=1.0 is not allowed"),
        ({}, {}, {"held_out": -1}, "held-out=-1 is not allowed"),
        ({}, {}, {"resume": 0}, "resume=0 is not allowed"),
    ],
)
def test_check_run_names_what_is_not_allowed(model, adapter, others, message):
    with pytest.raises(ValueError, match=message):
        check_run(ModelOptions(**model), AdapterOptions(**adapter), **others)


def test_check_run_allows_the_defaults_and_no_quantisation():
    check_run(ModelOptions(codebook="none"), AdapterOptions(), resume=True)
    for method in ("lora", "rslora", "dora", "pissa", "loftq"):
        check_run(ModelOptions(), AdapterOptions(method=method), PLUS)
        check_run(ModelOptions(), AdapterOptions(method=method), PACKED)


NO_OPTION = ("model", "tokenizer", "seed", "progress")


def test_the_options_of_a_method_are_those_of_its_function():
    for method, names in METHOD_OPTIONS.items():
        parameters = signature((LORA | MAKERS)[method]).parameters
        assert [name for name in parameters if name not in NO_OPTION] == list(names)
        for name in names:
            assert parameters[name].default == AdapterOptions.__dataclass_fields__[name].default
    assert tuple(METHOD_OPTIONS) == METHODS


@pytest.mark.parametrize(
    ("words", "name", "wanted"),
    [
        (["finetune", "--out=~/x"], "out", "HOME/x"),
        (["finetune", "--data", "~/x.jsonl"], "data", "HOME/x.jsonl"),
        (["finetune", "--model=~/x"], "model", "HOME/x"),
        (["sweep", "~/x", "--out=~"], "out", "HOME"),
        (["tournament", "m", "--adapters", "~/x", "y~/x"], "adapters", ["HOME/x", "y~/x"]),
        (["verify", "~/x"], "folder", "HOME/x"),
        (["xray", "~/x", "~/y"], "other", "HOME/y"),
        (["finetune", "--out=~nobody-of-this-name/x"], "out", "~nobody-of-this-name/x"),  # as a shell leaves it
        (["generate", "~/x"], "question", "~/x"),  # a text
    ],
)
def test_every_path_knows_the_home_folder(words, name, wanted, monkeypatch, tmp_path):
    """A shell expands the ~ of `--out ~/x`, but not that of `--out=~/x`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    found = getattr(cli.build_parser().parse_args(words), name)
    several = [path.replace("HOME", str(tmp_path)) for path in ([wanted] if isinstance(wanted, str) else wanted)]
    assert found == (several[0] if isinstance(wanted, str) else several)
