"""Several processes train what one would; with sharding each holds its part of the base, and all of it afterwards.

Run by torchrun, this file is the work of one process: it goes through CASES and saves what it saw.
"""

import gc
import json
import os
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qlora_lab as ql
from qlora_lab import cli
from qlora_lab.adapters.adapter import adapters, learned
from qlora_lab.adapters.add_adapter import METHODS, add_adapter
from qlora_lab.adapters.lora import add_lora
from qlora_lab.data.dataset import IGNORED
from qlora_lab.data.examples import Example
from qlora_lab.kernels import product
from qlora_lab.model.linear4bit import Linear4bit, quantize_linears
from qlora_lab.train import distributed, trainer
from qlora_lab.train.distributed import OneProcess, first_on_node, processes
from qlora_lab.train.engines import engine_for
from qlora_lab.train.loss import answer_loss
from qlora_lab.train.settings import Settings
from qlora_lab.train.sharded import _Linear4bitShard
from qlora_lab.train.trainer import Training

ROOT = Path(__file__).parents[2]
SIZE = 2
# 19 examples in batches of 6: the last of an epoch has one row, so that one of two processes has nothing to learn
EXAMPLES = [Example((("user", f"{i} and {i}"), ("assistant", "too " * (i % 5) + "two"))) for i in range(19)]
SETTINGS = {"steps": 20, "batch_size": 6, "lr": 2e-3, "save_every": 0}
TRAIN = '{"instruction": "double %d", "output": "%d"}\n'
SMALL = {"micro_batch_size": 1, "gradient_checkpointing": True, "eval_every": 7}


def load(folder, dropout=0.0):
    model, tokenizer = ql.load(folder, dtype=torch.float32, device="cpu", progress=False)
    return add_lora(model, r=4, dropout=dropout), tokenizer


def train(loaded, out, each=lambda training, line: None, resume=False, **settings):
    """The Training of a run that is over; `each` sees every step."""
    settings = Settings(**SETTINGS | settings)
    held_out = EXAMPLES[:3] if settings.eval_every else ()
    training = Training(*loaded, EXAMPLES, out, settings, held_out=held_out, resume=resume, progress=False)
    for line in training:
        each(training, line)
    return training


def seen(training):
    learned = {n: p.detach().clone() for n, p in training.model.named_parameters() if p.requires_grad}
    return {"losses": training.result.losses, "held_out": training.result.held_out, "adapters": learned}


# ----------------------------------------------------------------------------------- the work of one process of several


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}


def same(model, before):
    after = model.state_dict()
    return all(torch.equal(after[name], tensor) for name, tensor in before.items())


def packed_bytes(constants):
    """Bytes of all uint8 tensors of this process, each memory once, without constants and what kernels work in."""
    gc.collect()
    others = {t.untyped_storage().data_ptr() for t in [*constants, *vars(product._local).values()]}
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter) and o.dtype == torch.uint8]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for address, size in storages.items() if address not in others)


def whole_run(folder, out, **settings):
    loaded = load(folder)
    before = bits(loaded[0])
    training = train(loaded, out, **settings)
    return seen(training) | {"base_is_whole": same(loaded[0], before)}


def stopped_and_resumed(folder, out, **settings):
    settings["steps"] = 8
    runs = [seen(train(load(folder, dropout=0.1), out / "whole", **settings))]
    train(load(folder, dropout=0.1), out / "cut", lambda run, line: line["step"] == 4 and run.stop(), **settings)
    return [*runs, seen(train(load(folder, dropout=0.1), out / "cut", resume=True, **settings))]


def bytes_held(folder, out, **settings):
    loaded, held = load(folder), []
    weights = [m.weight for m in loaded[0].modules() if isinstance(m, Linear4bit)]
    packed, constants = [w.packed.nbytes for w in weights], [w.constants.absmax_codes for w in weights]
    del weights
    before = packed_bytes(constants) - sum(packed)  # torch's own
    train(loaded, out, lambda *_: held.append(packed_bytes(constants) - before), steps=2, **settings)
    return {"packed": packed, "held": [*held, packed_bytes(constants) - before]}


def errors(folder, out, rank, **settings):
    """What each process raises when a step fails, the first cannot save, options differ, or the loss is infinite."""
    loaded, raised = load(folder), {}
    before = bits(loaded[0])

    def attempt(name, **kwargs):
        try:
            train(loaded, out / name, **settings | kwargs)
        except Exception as error:
            words = "\n".join([str(error), *getattr(error, "__notes__", [])])
            raised[name] = type(error).__name__, words, same(loaded[0], before)

    def fail(*_):
        raise ArithmeticError("in the midst of a run")

    def full(*_):
        raise OSError("the disk is full")

    def explode(run, _):
        for parameter in run.model.parameters():
            if parameter.requires_grad:
                parameter.data.fill_(1e30)

    attempt("step", each=fail)
    saves, trainer.save_adapter = trainer.save_adapter, full if rank == 0 else trainer.save_adapter
    attempt("save", steps=1)
    trainer.save_adapter = saves
    attempt("options", steps=1 + rank)
    attempt("loss", each=explode)
    return raised


def each_method(folder, out):
    """Two steps of each; BitFit on a copy that has biases."""
    runs = {}
    for method in METHODS:
        place = folder.with_name("biased") if method == "bitfit" else folder
        codebook = None if method == "full" else "nf4"
        model, tokenizer = ql.load(place, codebook, dtype=torch.float32, device="cpu", progress=False)
        start = {name: p.clone() for name, p in learned(add_adapter(model, method, progress=False)).items()}
        run = train((model, tokenizer), out / method, steps=2, lr=1e-4)
        runs[method] = seen(run) | {"moved": any(not torch.equal(p, start[n]) for n, p in learned(model).items())}
    return runs


def main(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    with processes() as rank:
        results = {}
        for kind, shard in (("ddp", False), ("fsdp", True)):
            place = out / kind
            results[kind] = {
                "plain": whole_run(folder, place / "plain", shard=shard),
                "small": whole_run(folder, place / "small", shard=shard, **SMALL),
                "resumed": stopped_and_resumed(folder, place / "resumed", shard=shard),
                "bytes": bytes_held(folder, place / "bytes", shard=shard),
                "errors": errors(folder, place / "errors", rank, shard=shard),
            }
        results["methods"] = each_method(folder, out / "methods")
    torch.save(results, out / f"{rank}.pt")


# --------------------------------------------------------------------------------------------------------------- tests


def torchrun(*argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(SIZE), *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}  # as pytest's
    return subprocess.run([str(a) for a in command], capture_output=True, text=True, env=environment, timeout=600)


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A model whose feed-forward weights have an odd number of bytes, 33 * 18 / 2, and its tokenizer."""
    shape = {"hidden_size": 18, "intermediate_size": 33, "num_hidden_layers": 2, "num_attention_heads": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in ("model", "biased"):
            config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **shape)
            config.attention_bias = name == "biased"
            LlamaForCausalLM(config).save_pretrained(tmp_path / name)
            tokenizer.save_pretrained(tmp_path / name)
    return tmp_path / "model"


@pytest.mark.slow
def test_two_processes_do_what_one_does(folder, tmp_path):
    """One launch for all of it: most of its time is spent on starting."""
    done = torchrun(__file__, folder, tmp_path)
    assert done.returncode == 0, done.stderr
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(SIZE)]
    for case, settings in (("plain", {}), ("small", SMALL)):
        one = seen(train(load(folder), tmp_path / case, **settings))
        assert one["losses"][-1] < 0.9 * one["losses"][0]
        for kind in ("ddp", "fsdp"):
            first, second = (results[kind][case] for results in both)
            torch.testing.assert_close(first["losses"], one["losses"], rtol=0, atol=1e-4)
            torch.testing.assert_close(first["held_out"], one["held_out"], rtol=0, atol=1e-4)
            torch.testing.assert_close(first["adapters"], one["adapters"], rtol=0, atol=1e-4)
            assert first["base_is_whole"] and second["base_is_whole"]
            equal(first, second)
    for results in both:
        for kind in ("ddp", "fsdp"):
            equal(*results[kind]["resumed"])
        check_bytes(results["ddp"]["bytes"], results["fsdp"]["bytes"])
    for method, one in each_method(folder, tmp_path / "each").items():
        first, second = (results["methods"][method] for results in both)
        assert first["moved"], method
        equal(first, second)
        torch.testing.assert_close(first["losses"], one["losses"], rtol=0, atol=1e-4)
        torch.testing.assert_close(first["adapters"], one["adapters"], rtol=0, atol=1e-5)  # of two steps of 1e-4
    for kind in ("ddp", "fsdp"):
        check_errors(*(results[kind]["errors"] for results in both))


def equal(a, b):
    """Bit for bit."""
    assert a["losses"] == b["losses"] and a["held_out"] == b["held_out"]
    assert all(torch.equal(tensor, b["adapters"][name]) for name, tensor in a["adapters"].items())


def check_bytes(whole, shards):
    packed = whole["packed"]
    assert any(size % SIZE for size in packed)
    assert whole["held"] == [sum(packed)] * 3
    assert shards["held"] == [sum(-(-size // SIZE) for size in packed)] * 2 + [sum(packed)]  # whole again after the run


def check_errors(first, second):
    assert first.keys() == second.keys() == {"step", "save", "options", "loss"}
    everything = [*first.values(), *second.values()]
    assert all(whole and "still spread" not in words for _, words, whole in everything)  # closed once, not twice
    kinds = [{name: kind for name, (kind, _, _) in errors.items()} for errors in (first, second)]
    expected = {"step": "ArithmeticError", "options": "ValueError", "loss": "FloatingPointError"}
    assert kinds[0] == expected | {"save": "OSError"}
    assert kinds[1] == expected | {"save": "ConnectionAbortedError"}
    assert "processes 0 and 1 do not work on the same run, steps: 1 and 2;" in second["options"][1]
    assert "q_proj, float32, has" in first["loss"][1]


@pytest.mark.slow
def test_the_command_line_under_torchrun(folder, tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(TRAIN % (i, 2 * i) for i in range(12)))
    options = ["--model", folder, "--data", tmp_path / "data.jsonl", "--test-data", tmp_path / "data.jsonl"]
    options += ["--held-out", 2, "--steps", 3, "--r", 2, "--dtype", "float32", "--json", "--quiet"]
    done = torchrun("-m", "--", "qlora_lab.cli", "finetune", *options, "--shard", "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()  # of one process alone
    assert cli.main([str(a) for a in ["finetune", *options, "--out", tmp_path / "one"]]) == 0
    figures = json.loads((tmp_path / "one" / "result.json").read_text())
    assert abs(json.loads(line)["loss_last"] - figures["loss"]) < 1e-4
    assert (tmp_path / "two" / "adapter" / "adapter_model.safetensors").is_file()


def test_other_processes_say_which_they_are(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert cli.main(["finetune", "--data", "no.jsonl"]) == 2
    assert capsys.readouterr().err.startswith("qlora-lab finetune: ")  # a RANK alone is left over
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.main(["finetune", "--data", "no.jsonl"]) == 2
    assert capsys.readouterr().err.startswith("qlora-lab finetune (process 3): ")


def test_one_process_is_no_group(tiny_llama):
    with processes() as rank, engine_for(tiny_llama) as engine:
        assert rank == 0 and type(engine) is OneProcess and engine.model is tiny_llama
        assert engine.sum(1.0, 2.0) == (1.0, 2.0) and first_on_node(lambda: 3) == 3


@pytest.mark.parametrize("empty", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
def test_an_empty_variable_is_none(monkeypatch, capsys, empty):
    monkeypatch.setenv(empty, "")
    with processes() as rank:
        assert rank == 0 and not distributed.joined()
    assert cli.main(["finetune", "--data", "no.jsonl"]) == 2 and "no.jsonl" in capsys.readouterr().err


TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a whole number: start all processes with torchrun"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE='-2' is not a whole number"),
        ({"WORLD_SIZE": "٢"}, "WORLD_SIZE='٢' is not a whole number"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE='9{60}' is not a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is not allowed, there is at least 1 process: start all"),
        ({"WORLD_SIZE": "2"}, "RANK is not set, but WORLD_SIZE is: start all processes with torchrun"),
        (TWO | {"RANK": "2"}, "RANK=2 is not allowed, WORLD_SIZE=2 has ranks from 0 to 1: start all"),
        (TWO | {"LOCAL_RANK": ""}, "LOCAL_RANK is not set, but .*, or unset WORLD_SIZE for one$"),
        (TWO | {"MASTER_ADDR": ""}, "MASTER_ADDR is not set, but WORLD_SIZE is: start all"),
        (TWO | {"MASTER_PORT": ""}, "MASTER_PORT is not set, but WORLD_SIZE is: start all"),
        (TWO | {"MASTER_PORT": "zzz"}, "MASTER_PORT='zzz' is not a whole number: start all"),
        (TWO | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is not allowed, ports are 1 to 65535: start all"),
        (TWO | {"MASTER_PORT": "0"}, "MASTER_PORT=0 is not allowed, ports are 1 to 65535"),
    ],
)
def test_variables_that_torchrun_does_not_set_are_refused(monkeypatch, capsys, tmp_path, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said), processes():
        pass
    (tmp_path / "data.jsonl").write_text(TRAIN % (1, 2))
    options = ["--data", str(tmp_path / "data.jsonl"), "--held-out", "0", "--out", str(tmp_path / "run"), "--quiet"]
    assert cli.main(["finetune", *options]) == 2
    assert re.match(f"qlora-lab finetune: {said}", capsys.readouterr().err.rstrip())


def test_one_process_has_nobody_to_share_with(capsys, tiny_llama, tmp_path):
    with (
        pytest.raises(ValueError, match="this is the only one: start several with `torchrun"),
        engine_for(tiny_llama, True),
    ):
        pass
    (tmp_path / "data.jsonl").write_text(TRAIN % (1, 2))
    argv = ["finetune", "--model", "nowhere", "--data", tmp_path / "data.jsonl", "--shard", "--out", tmp_path / "run"]
    assert cli.main([str(a) for a in argv]) == 2 and "this is the only one" in capsys.readouterr().err


def test_constants_of_process_0_become_those_of_all(tiny_llama, monkeypatch):
    """PiSSA's A0 and B0 belong to the A and B that process 0 sends."""
    model = add_adapter(tiny_llama, "pissa", r=2)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "broadcast", lambda flat, src: flat.fill_(0.5))
    distributed._Several(model)
    for layer in adapters(model).values():
        assert all((tensor == 0.5).all() for tensor in (*layer.learned().values(), layer.first_A, layer.first_B))


def test_a_row_without_answer_gives_zero_gradients(tiny_llama):
    """What a process trains on when there are fewer rows than processes."""
    model = add_lora(quantize_linears(tiny_llama), r=4)
    batch = {"input_ids": torch.arange(8).view(1, 8), "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    summed, count = answer_loss(model, batch | {"labels": torch.full((1, 8), IGNORED)})
    summed.backward()
    assert (summed.item(), count) == (0, 0)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_shard_computes_the_same_and_its_memory_can_be_taken_back(double_quant):
    linear = quantize_linears(torch.nn.Sequential(torch.nn.Linear(18, 33)), double_quant=double_quant)[0]
    shard, x = _Linear4bitShard(deepcopy(linear)), torch.randn(40, 18, requires_grad=True)
    grads = [torch.autograd.grad(layer(x).square().sum(), x)[0] for layer in (linear, shard)]
    assert torch.equal(linear(x), shard(x)) and torch.equal(*grads)
    kept = shard(x).square().sum()
    storage = shard.packed.untyped_storage()
    contents = shard.packed.clone()
    storage.resize_(0)  # as FSDP2 does between forward and backward
    storage.resize_(len(contents))
    shard.packed.copy_(contents)
    assert torch.equal(torch.autograd.grad(kept, x)[0], grads[0])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
