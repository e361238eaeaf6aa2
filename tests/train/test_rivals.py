"""Two commands into one place: one of them does its work as if it were alone, the other is told who does, and ends."""

import json
import re
import sys

import pytest
import torch
from safetensors.torch import load_file

import qlora_lab as ql
from qlora_lab import cli
from qlora_lab.adapters.lora import add_lora
from qlora_lab.data.examples import Example
from qlora_lab.files.lock import LOCK, locked_file, locked_folder
from qlora_lab.train.settings import Settings
from qlora_lab.train.trainer import Training, finetune
from tests import warm

EXAMPLES = [Example((("user", f"{i} and {i}"), ("assistant", "two"))) for i in range(4)]
TOLD = (
    r"qlora-lab {}: \S+ is in use by process \d+ on \S+ \({}\) since [\d-]+ [\d:]+: wait until it has ended, or name "
)


@pytest.mark.usefixtures("one_thread")
def test_a_second_run_in_one_notebook_is_told_and_the_first_one_goes_on(tiny_llama, tokenizer, tmp_path):
    model = add_lora(tiny_llama, r=2)
    settings = Settings(steps=2, batch_size=2)
    first = Training(model, tokenizer, EXAMPLES, tmp_path, settings, progress=False)
    early = Training(model, tokenizer, EXAMPLES, tmp_path, settings, overwrite=True, progress=False)  # before it began
    for line in first:
        for second in (early.run, lambda: finetune(model, tokenizer, EXAMPLES, 1, tmp_path, overwrite=True))[
            line["step"] - 1 :
        ]:
            with pytest.raises(BlockingIOError, match=r"is in use by this very process \(finetune\) since"):
                second()
    assert first.result.ended == "all steps" and not (tmp_path / LOCK).exists()


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_was_ended_by_its_caller_gives_the_folder_back(tiny_llama, tokenizer, tmp_path):
    model = add_lora(tiny_llama, r=2)
    for _ in Training(model, tokenizer, EXAMPLES, tmp_path, Settings(steps=9, batch_size=2), progress=False):
        break
    assert not (tmp_path / LOCK).exists()
    assert finetune(model, tokenizer, EXAMPLES, 1, tmp_path, batch_size=2, progress=False).ended == "all steps"


def test_a_run_that_ended_while_another_was_prepared_is_not_replaced(tiny_llama, tokenizer, tmp_path):
    """Each was free to begin when it was made; the second one finds the work of the first."""
    model = add_lora(tiny_llama, r=2)
    a, b = (Training(model, tokenizer, EXAMPLES, tmp_path, Settings(steps=1, batch_size=2, seed=seed), progress=False)
            for seed in (1, 2))  # fmt: skip
    a.run()
    with pytest.raises(FileExistsError, match="holds an earlier run: choose another folder, or overwrite it"):
        b.run()
    assert json.loads((tmp_path / "settings.json").read_text())["seed"] == 1


# --------------------------------------------------------------------------------------------------- the command line

COMMANDS = {
    "finetune": "finetune --model MODEL --data DATA --steps 2 --r 2 --held-out 0 --seed {} --quiet --out OUT",
    "quantize": "quantize MODEL --block-size {} --quiet --out OUT",
    "merge": "merge MODEL --block-size {} --adapter ADAPTER --anyway --quiet --out OUT",
    "sweep": "sweep MODEL --text TEXT --windows 1 --length 8 --block-sizes {} --quiet --out OUT",
    "tournament": "tournament MODEL --codebooks none nf4 --questions 2 --max-new-tokens 1 --block-size {} --quiet "
    "--out OUT",
    "block-size": "block-size MODEL --bits {}.5 --text TEXT --windows 1 --length 8 --quiet --out OUT",
}
TWO = {"finetune": (1, 2), "quantize": (64, 32), "merge": (64, 32), "sweep": (64, 32), "block-size": (5, 6)}
TWO["tournament"] = (64, 32)


@pytest.fixture
def line(folder, tmp_path):
    """The words of a command."""
    (tmp_path / "data.jsonl").write_text('{"instruction": "one", "output": "two"}\n' * 8)
    (tmp_path / "text").write_text("the sum of the two numbers " * 9)
    names = {"MODEL": folder, "DATA": tmp_path / "data.jsonl", "TEXT": tmp_path / "text"}
    model, _ = ql.load(folder, progress=False)
    names["ADAPTER"] = ql.save_adapter(add_lora(model, r=2), tmp_path / "trained")

    def words(command, value, out):
        return [str((names | {"OUT": out}).get(word, word)) for word in COMMANDS[command].format(value).split()]

    return words


@pytest.mark.parametrize(
    "command, mode", [*((name, "") for name in COMMANDS), ("finetune", "--resume"), ("finetune", "--overwrite")]
)
def test_a_command_is_told_before_it_loads_a_model(line, tmp_path, capsys, command, mode):
    out = tmp_path / "out"
    take = locked_folder if command in ("finetune", "quantize", "tournament") else locked_file
    words = [word if word != str(tmp_path / "model") else "nowhere" for word in line(command, 64, out)]
    with take(out, command):
        assert cli.main([*words, *mode.split()]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"qlora-lab \S+: \S+ is in use by this very process \(\S+\) since .*\n", said)
    assert not out.exists()


@pytest.mark.slow  # two processes a pair
@pytest.mark.filterwarnings("ignore:the adapter in .* was trained beside weights in nf4")  # the merges differ in that
@pytest.mark.parametrize("command", COMMANDS)
def test_two_processes_never_mix_their_results(line, tmp_path, command):
    out = tmp_path / "out"
    start = [sys.executable, "-m", "qlora_lab.cli"]
    lines = [start + line(command, value, out) for value in TWO[command]]
    errors = [tmp_path / "first", tmp_path / "second"]
    both = [warm.program(words, err=path) for words, path in zip(lines, errors, strict=True)]
    for child in both:
        child.join()
    said = [path.read_text("utf-8") for path in errors]
    codes = [child.exitcode for child in both]
    assert 0 in codes and set(codes) <= {0, 2}, said
    for code, line_said in zip(codes, said, strict=True):
        told = re.search(TOLD.format(command, command), line_said)
        # who comes late finds the other's work; rows of a sweep go into one file, and a plan is replaced by a plan
        late = "holds an earlier run" in line_said or "holds a model already" in line_said
        late = late or "is not empty" in line_said
        assert code == 0 or told or late, line_said
    winner = TWO[command][codes.index(0)]
    alone = tmp_path / "alone"
    assert cli.main(line(command, winner, alone)) == 0  # here, where all is imported
    if codes == [0, 0]:
        assert command in ("sweep", "block-size")
    elif command == "finetune":
        assert json.loads((out / "settings.json").read_text())["seed"] == winner
        a, b = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (out, alone))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    elif command in ("quantize", "merge"):
        files = {path.name: path.read_bytes() for path in alone.iterdir()}
        assert files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert not list(tmp_path.rglob("*.lock")) and not list(tmp_path.rglob(".qlora-lab*"))
