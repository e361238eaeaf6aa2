"""What a resume reads of itself: a forged state and a changed log are named, whatever their checksums say."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

import qlora_lab as ql
from qlora_lab.adapters.add_adapter import add_adapter
from qlora_lab.adapters.lora import lora_layers
from qlora_lab.data.examples import Example
from qlora_lab.files.checksums import sha256
from qlora_lab.kernels import product
from qlora_lab.train.identity import own_threads
from qlora_lab.train.resumed import check_facts, check_tensors, read_log
from qlora_lab.train.settings import Settings
from qlora_lab.train.trainer import Training
from tests.readers import copy_model
from tests.test_readers import seconds

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = [Example((("user", f"a {letter}"), ("assistant", "b"))) for letter in "abcdefgh"]


def training(model_folder, out, resume=False) -> Training:
    model, tokenizer = ql.load(model_folder, None, dtype=torch.float32, progress=False)
    ql.add_lora(model, r=2)
    settings = Settings(steps=4, batch_size=2, save_every=2, max_length=40)
    return Training(model, tokenizer, EXAMPLES, out, settings, resume=resume, progress=False)


def stopped(model_folder, out) -> None:
    """A run of four steps that was asked to stop after the second."""
    run = training(model_folder, out)
    for line in run:
        if line["step"] == 2:
            run.stop()


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A model, and a run that stopped."""
    home = tmp_path_factory.mktemp("resumed")
    copy_model(home / "model")
    with own_threads():
        torch.set_num_threads(1)  # one_thread comes later: it belongs to each test
        stopped(home / "model", home / "run")
    return home


FORGED = [
    (("run",), None, "has run=None: it must be a JSON object"),
    (("log_sha256",), "DELETED", "has no 'log_sha256': it must be a text"),
    (("batches",), "DELETED", "has no 'batches': it must be a JSON object"),
    (("best", "loss"), "x", "best has loss='x': it must be a number, or null"),
    (("batches", "position"), -1, "batches has position=-1: it must be a whole number of at least 0"),
    (("batches", "seed"), "DELETED", "batches has no 'seed'"),
    (("run", "data"), {}, "run has data={}: it must be a JSON object with kept, a whole number, and sha256"),
    (("run", "schedule"), ["constant"], "run has schedule=.*: it must be a text"),
    (("run", "steps"), True, "run has steps=True: it must be a whole number of at least 1"),
    (("arithmetic", "race"), 1.5, "arithmetic has race=1.5: it must be a list of 3 numbers"),
    (("arithmetic", "race"), [1, 2], "it must be a list of 3 numbers"),
    (("arithmetic", "race"), [1, "x", 3], "it must be a list of 3 numbers"),
    (("scaler",), {"scale": "x"}, "scaler has scale='x': it must be a number"),
]


@pytest.mark.parametrize(("path", "value", "said"), FORGED)
def test_a_forged_state_is_named(begun, tmp_path, path, value, said):
    shutil.copytree(begun / "run", tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "step-00000002"
    facts = json.loads((step / "state.json").read_text())
    *parents, last = path
    part = facts
    for parent in parents:
        part = part[parent]
    part.pop(last) if value == "DELETED" else part.update({last: value})
    (step / "state.json").write_text(json.dumps(facts))
    sums = (step / "SHA256SUMS").read_text().splitlines()
    (step / "SHA256SUMS").write_text("".join(f"{sha256(step / line[66:])}  {line[66:]}\n" for line in sums))
    with pytest.raises(ValueError, match=f"^{step / 'state.json'}.*{said}"):
        training(begun / "model", tmp_path / "run", resume=True).run()


def test_a_checkpoint_without_the_start_of_pissa_says_what_to_do(tiny_llama):
    """Those of runs begun before it was saved have only what learns."""
    model = add_adapter(tiny_llama, "pissa", r=2)
    wanted = {f"{path}.first_A": layer.first_A for path, layer in lora_layers(model).items()}
    with pytest.raises(ValueError, match="first_A is missing: resume from another checkpoint, or start a new run$"):
        check_tensors(Path("state.safetensors"), {}, wanted, [], 32)


@pytest.mark.parametrize("inside", ["", "run"])
def test_a_run_in_the_model_s_folder_is_refused(begun, inside):
    before = sorted((begun / "model").iterdir())
    with pytest.raises(ValueError, match="adapter lies inside .*model, which is an input: choose a place outside"):
        training(begun / "model", begun / "model" / inside)
    assert sorted((begun / "model").iterdir()) == before


def test_a_good_state_passes(begun):
    file = begun / "run" / "checkpoints" / "step-00000002" / "state.json"
    check_facts(json.loads(file.read_text()), file)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (b"", "log.jsonl lacks a line of the first 2 steps"),
        (b'{"step": 3, "loss": 1, "tokens": 1, "seconds": 1}\n', "log.jsonl lacks a line of the first 2 steps"),
        (b'{"step": 2, "loss": 1, "tokens": 1}\n', "log.jsonl, line 2 has no 'seconds': it must be a number"),
        (
            b'{"step": 2, "loss": null, "tokens": 1, "seconds": 1}\n',
            "log.jsonl, line 2 has loss=None: it must be",
        ),
        (b'{"step": 2, "loss": NaN, "tokens": 1, "seconds": 1}\n', "log.jsonl, line 2: NaN is not JSON"),
        (b'{"step": 2, "lo', "log.jsonl, line 2, column 13: it ends too early"),
        (b"[]\n", "log.jsonl, line 2 is a list, but a line is a JSON object"),
        (b" " * 50 * 2**20, "log.jsonl, line 2 has more than 16,384 bytes"),
        (b"\xff\n", "log.jsonl, line 2 is not UTF-8 text"),
    ],
)
def test_a_line_that_no_run_wrote_is_named(tmp_path, second, said):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"step": 1, "loss": 1.5, "tokens": 9, "seconds": 0.5}\n' + second)
    assert len(read_log(log, 1)) == 1  # what follows is of steps that no checkpoint has
    with pytest.raises(ValueError, match=said):
        read_log(log, 2)


@pytest.mark.long
def test_no_file_of_a_run_is_waited_for(begun, tmp_path):
    """A FIFO in the place of any of them: the run goes on without it, or names it."""
    names = sorted(path.relative_to(begun / "run") for path in (begun / "run").rglob("*") if path.is_file())
    assert len(names) > 6
    for number, name in enumerate(names):
        out = tmp_path / str(number)
        shutil.copytree(begun / "run", out)
        (out / name).unlink()
        os.mkfifo(out / name)
        with seconds(60):
            try:
                training(begun / "model", out, resume=True).run()
            except (ValueError, OSError) as error:
                assert name.name in str(error)


@pytest.mark.long
def test_a_race_that_one_routine_could_not_run_is_saved_and_resumed(begun, tmp_path):
    """Without oneDNN its time is infinity, which JSON has no word for: no checkpoint could be written."""
    product.keep(product.Race(1.0, math.inf, 2.0))
    stopped(begun / "model", tmp_path / "run")
    product.keep(product.Race(1.0, 9.0, 2.0))
    training(begun / "model", tmp_path / "run", resume=True).run()
    assert product.race() == product.Race(1.0, math.inf, 2.0)
