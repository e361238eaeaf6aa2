"""Memory that runs out: one sentence with what would need less and what is saved, whoever says it and wherever."""

import errno
import json
import sys

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qlora_lab as ql
from qlora_lab.model import load as models
from qlora_lab.model.out_of_memory import OutOfMemory, is_out_of_memory
from qlora_lab.train import trainer
from tests import warm
from tests.conftest import VOCABULARY
from tests.faults import NO_MEMORY, allocation_faults
from tests.train.test_checkpoint import same_result, training

pytestmark = pytest.mark.usefixtures("one_thread")

SAID = {
    "torch": RuntimeError(NO_MEMORY),
    "torch on Windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    "a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "C++": RuntimeError("std::bad_alloc"),
    "Python": MemoryError(),
    "mmap": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "torch's mmap": RuntimeError("unable to mmap 4096 bytes from file </a>: Cannot allocate memory (12)"),
    "the loader": ImportError("libx.so: failed to map segment from shared object"),
    "oneDNN": RuntimeError("could not create a primitive"),
    "numba": MemoryError("Allocation failed (probably too large)."),
}


@pytest.mark.parametrize("error", SAID.values(), ids=SAID)
def test_each_way_to_say_it_is_known(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("out of memory"),
        RuntimeError("shape mismatch"),
        RuntimeError("could not create a primitive descriptor for a matmul"),
        OSError(errno.ENOSPC, "full"),
        KeyError("x"),
    ],
)
def test_another_error_is_another_error(error):
    assert not is_out_of_memory(error)


def test_torch_and_numpy_say_it_so_today():
    for allocate in (lambda: torch.empty(2**60), lambda: np.ones(2**50)):
        with pytest.raises((RuntimeError, MemoryError)) as error:
            allocate()
        assert is_out_of_memory(error.value)


@pytest.mark.parametrize(
    "options, helps",
    [
        ({}, "load the copy that `qlora-lab quantize` makes of it"),
        ({"codebook": None}, 'load it in 4 bits, codebook="nf4"'),
    ],
)
def test_a_load_says_what_needs_less(folder, monkeypatch, options, helps):
    monkeypatch.setattr(models, "_place", lambda *_: torch.empty(2**60))
    with pytest.raises(OutOfMemory, match=f"out of memory while {folder} was loaded: {helps}"):
        ql.load(folder, progress=False, **options)


def test_a_mapped_folder_is_not_told_to_be_mapped(folder, tmp_path, monkeypatch):
    ql.quantize_folder(folder, tmp_path / "small", progress=False)
    monkeypatch.setattr(models, "_place", lambda *_: torch.empty(2**60))
    with pytest.raises(OutOfMemory, match="was loaded: close other programs, or choose a smaller model"):
        ql.load(tmp_path / "small", progress=False)


def short_in_step(run, number, monkeypatch):
    accumulate, made = trainer.accumulate, []

    def short(*args):
        made.append(1)
        if len(made) == number:
            raise RuntimeError(NO_MEMORY)
        return accumulate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "accumulate", short)
        with pytest.raises(OutOfMemory) as error:
            run.run()
    return str(error.value)


@pytest.mark.slow
def test_a_step_says_what_is_saved_and_its_advice_holds(folder, tmp_path, monkeypatch):
    """Its first advice is followed here: the resumed run recomputes activations, and is the undisturbed one."""
    out = tmp_path / "run"
    said = short_in_step(training(folder, out), 6, monkeypatch)
    resumed = f"resume from step 4 in {out} with gradient_checkpointing=True (--gradient-checkpointing)"
    assert said.startswith(f"out of memory in step 6: {resumed}, or begin a new run with a lower micro_batch_size")
    training(folder, out, resume=True, gradient_checkpointing=True).run()
    training(folder, tmp_path / "whole").run()
    same_result(out, tmp_path / "whole")


@pytest.mark.long
def test_before_the_first_checkpoint_nothing_is_saved(folder, tmp_path, monkeypatch):
    said = short_in_step(training(folder, tmp_path / "run"), 1, monkeypatch)
    assert said.startswith(
        "out of memory in step 1: nothing is saved yet: begin again with gradient_checkpointing=True"
    )
    said = short_in_step(training(folder, tmp_path / "run2", gradient_checkpointing=True), 1, monkeypatch)
    assert "nothing is saved yet: begin again where more is free, or begin a new run with a lower micro_" in said


@pytest.mark.slow
def test_every_kth_allocation_of_a_run_is_told_in_one_sentence(folder, tmp_path):
    """Whichever operation of torch gets no memory; the second try ends as if nothing had happened."""
    common = {"steps": 3, "save_every": 1, "eval_every": 2}
    with allocation_faults() as seen:
        training(folder, tmp_path / "whole", **common).run()
    for number in range(7, seen.count, seen.count // 5):
        out = tmp_path / str(number)
        with pytest.raises(OutOfMemory) as error, allocation_faults(at=number):
            training(folder, out, **common).run()
        assert is_out_of_memory(error.value)
        training(folder, out, resume=True, **common).run()
        same_result(out, tmp_path / "whole")


# ------------------------------------------------------------------------------------------------ truly little memory

LITTLE = """
import json, resource, sys
import torch, transformers, safetensors.torch
from qlora_lab import cli
from qlora_lab.model import load as models
from qlora_lab.train import trainer
from qlora_lab.train.resident import _status

def little(kibibytes):
    size = _status("VmSize") + 1024 * kibibytes
    resource.setrlimit(resource.RLIMIT_AS, (size, size))

where, room, argv = json.loads(sys.argv[1])
owner, name = {"load": (models, "_place"), "map": (models, "stored_tensors"), "step": (trainer, "accumulate")}[where]
make = getattr(owner, name)
def short(*args, **kwargs):
    setattr(owner, name, make)
    little(room)
    return make(*args, **kwargs)
setattr(owner, name, short)
sys.exit(cli.main(argv))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of 120 MiB, in one file."""
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 3, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **shape))
    folder = tmp_path_factory.mktemp("large")
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to RLIMIT_AS")
@pytest.mark.parametrize("where, room", [("map", 2**13), ("load", 2**14), ("step", 2**13)])
def test_a_process_that_has_too_little_says_one_line(large, tokenizer, tmp_path, where, room):
    tokenizer.save_pretrained(large)
    data = tmp_path / "train.jsonl"
    data.write_text((json.dumps({"instruction": "double 1", "output": "2, then 3, " * 18}) + "\n") * 8)  # 230 tokens
    argv = ["finetune", "--model", str(large), "--data", str(data), "--held-out", "0", "--steps", "1", "--quiet"]
    argv += ["--codebook", "none" if where == "load" else "nf4", "--dtype", "float32", "--out", str(tmp_path / "run")]
    words = [sys.executable, "-c", LITTLE, json.dumps([where, room, argv])]
    done = warm.run(words)
    assert done.returncode == 2, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line)
    assert line.startswith("qlora-lab finetune: out of memory")
