"""The command line: every mistake is one line and exit code 2; the commands do what the library does."""

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lab import cli
from qlora_lab.cli import options
from qlora_lab.files.ownership import RUN, mark

TRAIN = '{"instruction": "double %d", "output": "%d"}\n'


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(TRAIN % (i, 2 * i) for i in range(12)))
    return path


def run(capsys, *argv):
    code = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_finetune_then_generate(capsys, tmp_path, folder, data, monkeypatch):
    monkeypatch.setattr("qlora_lab.train.cost.rapl", lambda _: (None, "root alone"))
    out = tmp_path / "run"
    common = ["--model", folder, "--quiet", "--json"]
    options = ["--data", data, "--test-data", data, "--held-out", 2, "--steps", 2, "--r", 2, "--out", out]
    code, text, _ = run(capsys, "finetune", *common, *options)
    figures = json.loads(text)
    assert code == 0 and figures["steps"] == 2 and {"rouge_l_before", "held_out_loss_after"} <= figures.keys()
    assert figures["processor_seconds"] > 0 and (figures["joules"], figures["joules_note"]) == (None, "root alone")
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    code, text, _ = run(capsys, "generate", "double 3", *common, "--adapter", out / "adapter", "--max-new-tokens", 3)
    assert code == 0 and json.loads(text)["question"] == "double 3"


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("limit", [600, 1000])
def test_a_longer_row_in_training_is_also_tested(capsys, tmp_path, folder, data, limit):
    """At most 512 tokens, unless training takes longer rows. The second example has some 800."""
    path = tmp_path / "test.jsonl"
    path.write_text(TRAIN % (1, 2) + json.dumps({"instruction": "two " * 200, "output": "six"}))
    options = ["--data", data, "--test-data", path, "--steps", 1, "--r", 2, "--out", tmp_path / "run", "--quiet"]
    code, _, err = run(capsys, "finetune", "--model", folder, "--max-length", limit, *options)
    assert code == 0
    assert err.count("1 of 2 examples have more than 600 tokens") == (limit == 600), err  # before training, and once


@pytest.mark.filterwarnings("always")
def test_evaluations_during_training_tell_what_they_leave_out(capsys, tmp_path, folder, data):
    """They take rows as long as training's; the tests before and after take 512 tokens."""
    path = tmp_path / "test.jsonl"
    path.write_text(TRAIN % (1, 2) + json.dumps({"instruction": "two " * 50, "output": "six"}))
    options = ["--data", data, "--test-data", path, "--steps", 1, "--r", 2, "--out", tmp_path / "run", "--quiet"]
    code, _, err = run(capsys, "finetune", "--model", folder, "--max-length", 100, "--eval-every", 1, *options)
    assert code == 0
    assert err.count("1 of 2 examples have more than 100 tokens and do not count in the evaluations during") == 1, err
    assert "held-out loss" not in err


@pytest.mark.filterwarnings("always")
def test_an_adapter_of_another_model_is_told_in_one_line(capsys, tmp_path, folder):
    import qlora_lab as ql

    model, _ = ql.load(folder, progress=False)
    ql.save_adapter(ql.add_lora(model, r=2), tmp_path / "adapter")
    other = folder.rename(tmp_path / "other")
    capsys.readouterr()
    options = ["--model", other, "--adapter", tmp_path / "adapter", "--max-new-tokens", 1, "--quiet"]
    code, _, err = run(capsys, "generate", "double 3", *options)
    lines = [line for line in err.splitlines() if line.startswith("qlora-lab ")]
    assert code == 0 and len(lines) == 1 and "UserWarning" not in err
    assert lines[0].startswith(
        f"qlora-lab generate: the adapter in {tmp_path / 'adapter'} was trained on {folder}, but "
    )


def test_quantize_then_generate(capsys, tmp_path, folder):
    code, text, _ = run(
        capsys, "quantize", folder, "--out", tmp_path / "small", "--quiet", "--json", "--codebook", "fp4"
    )
    figures = json.loads(text)
    assert code == 0 and figures["folder"] == str(tmp_path / "small") and figures["bytes_of_weights"] > 0
    assert figures["read_by"].startswith("QLoRA Lab alone: blocks of 64 weights cross rows of 16 (model.layers.0.")
    options = ["--model", tmp_path / "small", "--quiet", "--max-new-tokens", 2]
    assert run(capsys, "generate", "double 3", *options)[0] == 0
    code, _, err = run(capsys, "quantize", folder, "--out", tmp_path / "small", "--quiet")
    assert code == 2 and "holds a model already: choose another folder" in err


@pytest.mark.long
def test_generate_shows_its_pictures_to_a_model_that_sees(capsys, tmp_path, llava_folder):
    from PIL import Image

    answers = set()
    for colour in ("black", "white", "red", "blue"):
        Image.new("RGB", (16, 16), colour).save(tmp_path / "one.png")
        options = ["--model", llava_folder, "--codebook", "none", "--quiet", "--max-new-tokens", 8]
        code, answer, _ = run(capsys, "generate", "<image> double", "--picture", tmp_path / "one.png", *options)
        answers.add(answer)
        assert code == 0
    assert len(answers) > 1  # the picture counts
    code, _, err = run(capsys, "generate", "no place", "--picture", tmp_path / "one.png", *options)
    assert code == 2 and "<image>" in err and err.count("\n") == 1


def test_quantize_tells_the_share_in_4_bits(capsys, tmp_path, folder):
    share = "98.5 % of the weights outside embeddings and head are in 4 bits\n"
    assert share in run(capsys, "quantize", folder, "--out", tmp_path / "told")[2]
    assert share not in run(capsys, "quantize", folder, "--out", tmp_path / "quiet", "--quiet")[2]


def test_plain_report(capsys, tmp_path, folder, data):
    options = ["--data", data, "--test-data", data, "--held-out", 2, "--steps", 1, "--r", 2, "--out", tmp_path / "run"]
    code, text, said = run(capsys, "finetune", "--model", folder, *options)
    assert "98.5 % of the weights outside embeddings and head are in 4 bits\n" in said
    assert code == 0 and "written by a person" in text and "loss last" in text
    assert all(f"\n{name}  " in text for name in ("processor seconds", "gpu seconds held ", "joules  ", "joules note"))
    assert "moments" in text and "float32" in text  # which bytes have which dtype, before the first step
    code, text, said = run(capsys, "finetune", "--model", folder, *options, "--overwrite", "--quiet")
    assert code == 0 and "loss last" in text and "moments" not in text and said == ""


@pytest.mark.long
def test_a_file_without_test_data_is_reported_as_not_tested(capsys, tmp_path, folder, data):
    options = ["finetune", "--model", folder, "--data", data, "--steps", 1, "--r", 2]
    code, text, said = run(capsys, *options, "--out", tmp_path / "a")
    (line,) = [line for line in said.splitlines() if line.startswith("nothing is tested: ")]
    assert code == 0 and "--test-data" in line and "--held-out 0" in line and "rouge" not in text
    code, _, said = run(capsys, *options, "--held-out", 0, "--out", tmp_path / "b")
    assert code == 0 and "tested" not in said


@pytest.mark.long
@pytest.mark.filterwarnings("always")
def test_bad_records_are_skipped_when_asked(capsys, tmp_path, folder, data):
    text = Path(data).read_text("utf-8")
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"instruction": 1}\n' + text, encoding="utf-8")
    options = ["--model", folder, "--data", path, "--test-data", path, "--held-out", 2, "--steps", 1, "--r", 2]
    out = ["--out", tmp_path / "run", "--json"]
    code, _, said = run(capsys, "finetune", *options, *out)
    assert code == 2 and "mixed.jsonl, line 1: " in said
    code, text, said = run(capsys, "finetune", *options, *out, "--skip-bad")
    figures = json.loads(text)
    assert code == 0 and "1 record was skipped: " in said
    assert figures["records_skipped"] == 1 and "mixed.jsonl, line 1: " in figures["skipped"][0]


@pytest.mark.parametrize("data", [["--data", "docstrings"], ["--data", "own.jsonl", "--test-data", "docstrings"]])
def test_docstrings_are_tested_on_their_test_split(monkeypatch, data):
    from qlora_lab.cli import finetune
    from qlora_lab.data import docstrings

    monkeypatch.setattr(docstrings, "TRAIN", ())
    monkeypatch.setattr(docstrings, "TEST", ("tqdm",))
    arguments = cli.build_parser().parse_args(["finetune", *data, "--held-out", "3", "--quiet"])
    assert finetune._held_out_examples(arguments) == docstrings.docstring_pairs(("tqdm",), False)[:3] != []


@pytest.mark.long
def test_an_interrupted_run_is_resumed(capsys, tmp_path, folder, data, monkeypatch):
    from qlora_lab.train import trainer

    common = ["finetune", "--model", folder, "--quiet", "--json", "--r", 2, "--data", data, "--test-data", data]
    options = ["--held-out", 2, "--steps", 3, "--eval-every", 2, "--optimizer-budget", "2MiB", "--packing"]
    make = trainer.accumulate

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return make(*args)

    monkeypatch.setattr(trainer, "accumulate", interrupted)
    code, out, err = run(capsys, *common, *options, "--out", tmp_path / "run")
    assert code == 130 and out == ""
    assert "qlora-lab finetune: stopped after step 1 of 3" in err and "(--resume on the command line)" in err
    monkeypatch.undo()
    code, out, _ = run(capsys, *common, *options, "--out", tmp_path / "run", "--resume")
    figures = json.loads(out)
    assert code == 0 and figures["steps"] == 3 and figures["best_step"] in (2, 3)
    assert figures["best_adapter"] == str(tmp_path / "run" / "best")


@pytest.mark.parametrize("text, size", [("4096", 4096), ("64KiB", 2**16), ("3 MiB", 3 * 2**20), ("2GiB", 2**31)])
def test_sizes(text, size):
    assert options.size(text) == size


def test_a_size_that_is_none_is_a_mistake(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["finetune", "--optimizer-budget", "much"])
    assert exit_.value.code == 2 and "'much' is not a size: give bytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["fetch", "gpt-5"], "unknown model 'gpt-5': give a name (smollm2-135m)"),
        (["finetune", "--data", "no.jsonl"], "no.jsonl"),
        (["finetune", "--data", "EMPTY"], "empty.jsonl"),
        (["finetune", "--data", "BROKEN"], "broken.jsonl, line 2"),
        (["finetune", "--data", "DATA", "--model", "MODEL", "--r", "0"], "r=0 is not allowed"),
        (["finetune", "--data", "DATA", "--model", "MODEL", "--block-size", "7"], "block_size=7 is not allowed"),
        (["finetune", "--data", "DATA", "--model", "MODEL", "--codebook", "nf9"], "codebook 'nf9' is not known"),
        (["finetune", "--data", "DATA", "--model", "MODEL", "--held-out", "-1"], "held-out=-1 is not allowed"),
        (["finetune", "--data", "DATA", "--model", "MODEL", "--alpha", "0"], "alpha=0.0 is not allowed"),
        (["finetune", "--data", "DATA", "--model", "MODEL", "--steps", "0"], "steps=0 is not allowed"),
        (["finetune", "--data", "DATA", "--model", "MODEL", "--targets", "qq"], "match no linear layer"),
        (["finetune", "--data", "DATA", "--model", "nowhere"], "unknown model 'nowhere'"),
        (["finetune", "--data", "DATA", "--model", "MODEL", "--schedule", "linear"], "schedule='linear' is not known"),
        (["finetune", "--data", "DATA", "--model", "MODEL", "--eval-every", "2"], "needs held-out examples"),
        (["finetune", "--data", "DATA", "--model", "MODEL", "--resume", "--overwrite"], "exclude each other"),
        (["generate", "hi", "--model", "MODEL", "--adapter", "nowhere"], "nowhere is not a folder: name a"),
        (["generate", "hi", "--model", "MODEL", "--adapter", ""], " has no adapter_config.json"),
        (["finetune", "--data", "DATA", "--model", "MODEL", "--test-data", ""], "no data file at ."),
        (["generate", "caf\udce9", "--model", "MODEL"], r"the question holds '\udce9', half of a surrogate pair"),
        (["block-size", "MODEL", "--bits", "4.03", "--out", "p.json"], "too small: the smallest plan takes 4.08"),
        (["block-size", "MODEL", "--bits", "4.5", "--out", "p.json", "--text", "BYTES"], "bytes is not UTF-8 text"),
        (["block-size", "nowhere", "--bits", "4.5", "--out", "p.json", "--codebooks", "nf9"], "'nf9' is not known"),
        (["block-size", "nowhere", "--bits", "4.5", "--out", "no/p.json"], "no: create it, or choose another"),
        (["block-size", "nowhere", "--bits", "4.5", "--out", "."], ". is not a file, so it cannot become a plan"),
        (["quantize", "nowhere", "--out", "small", "--plan", "EMPTY"], "empty.jsonl is not a plan, or is cut off"),
        (["open", "."], ". holds other files than the course: name a new folder"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, tmp_path, folder, data, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text(TRAIN % (1, 2) + '{"instruction": \n')
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    names = {"DATA": data, "MODEL": folder, "EMPTY": "empty.jsonl", "BROKEN": "broken.jsonl", "BYTES": "bytes"}
    code, out, err = run(capsys, *(names.get(a, a) for a in argv))
    assert code == 2 and message in err and not out
    assert len([line for line in err.splitlines() if line.startswith("qlora-lab ")]) == 1 and "Traceback" not in err
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("adapter"))


def test_a_damaged_model_file_is_named(capsys, folder, data):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    code, _, err = run(capsys, "finetune", "--model", folder, "--data", data)
    assert code == 2 and "model.safetensors" in err


def test_an_earlier_run_is_refused_before_the_model_is_loaded(capsys, tmp_path, data):
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    mark(tmp_path / "run", RUN)
    code, _, err = run(capsys, "finetune", "--model", "nowhere", "--data", data, "--out", tmp_path / "run")
    assert code == 2 and "holds an earlier run" in err


def test_the_seed_of_the_command_line_is_the_adapters_too(capsys, tmp_path, folder, data, monkeypatch):
    seeds = []
    add_adapter = cli.ql.add_adapter
    monkeypatch.setattr(
        cli.ql, "add_adapter", lambda *args, **kw: seeds.append(kw.get("seed")) or add_adapter(*args, **kw)
    )
    options = ["--model", folder, "--data", data, "--steps", 1, "--r", 2, "--held-out", 0, "--seed", 7]
    assert run(capsys, "finetune", *options, "--out", tmp_path / "run")[0] == 0 and seeds == [7]


def test_a_bug_is_not_blamed_on_the_user(monkeypatch):
    monkeypatch.setattr("qlora_lab.cli.ql.fetch", lambda *a, **k: 1 + "1", raising=False)
    with pytest.raises(TypeError):
        cli.main(["fetch", "smollm2-135m"])


@pytest.mark.parametrize("command", ["fetch", "finetune", "generate", "open"])
def test_help_shows_an_example(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0 and f"example: qlora-lab {command}" in " ".join(capsys.readouterr().out.split())


def test_the_parser_of_one_command_is_that_among_all(capsys):
    """`main` makes no other; without a command it knows all of them."""

    def helps(parser):
        return {name: command.format_help() for name, command in parser._subparsers._group_actions[0].choices.items()}

    every = helps(cli.build_parser())
    assert tuple(every) == cli.COMMANDS
    for name in cli.COMMANDS:
        assert helps(cli.build_parser([name])) == {name: every[name]}
    for words in (["--help"], ["dance"], []):
        with pytest.raises(SystemExit):
            cli.main(words)
    said = capsys.readouterr()
    assert all(f"    {name} " in said.out or f"    {name}\n" in said.out for name in cli.COMMANDS)
    assert "choose from" in said.err and all(repr(name) in said.err for name in cli.COMMANDS)


def test_help_is_quick_and_argparse_errors_are_code_2():
    code = "import sys, qlora_lab.cli; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
    with pytest.raises(SystemExit) as stop:
        cli.main(["dance"])
    assert stop.value.code == 2


@pytest.mark.long
def test_commands_of_the_documentation_are_understood():
    root = Path(__file__).parents[2]
    pages = [root / "README.md", *(root / "docs").glob("*.md")]
    lines = [line for page in pages for line in page.read_text("utf-8").splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("qlora-lab ")]
    assert len(commands) >= 9
    for words in commands:
        cli.build_parser().parse_args(words)  # exits where an argument is missing or unknown
