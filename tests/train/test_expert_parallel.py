"""Two processes that hold half of the experts each train what one would, and all is whole afterwards.

Run by torchrun, this module is the work of one process, as in test_distributed.py.
"""

import gc
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import qlora_lab as ql
from qlora_lab import cli
from qlora_lab.adapters.expert_lora import LoRAStack
from qlora_lab.adapters.lora import add_lora
from qlora_lab.model.experts4bit import Stack4bit
from qlora_lab.quant.stack import quantize_stack
from qlora_lab.train import distributed, expert_parallel
from qlora_lab.train.distributed import processes
from qlora_lab.train.engines import engine_for
from qlora_lab.train.expert_parallel import Exchange, StackPart, _with_parts, check_experts
from qlora_lab.train.settings import Settings
from tests.model.families import tiny
from tests.train.test_distributed import SIZE, TRAIN, bits, equal, same, seen, torchrun, train

# One micro-batch a row; some have no token for some process; layers are computed again in backward.
SMALL = {"micro_batch_size": 1, "gradient_checkpointing": True, "eval_every": 3, "steps": 4}
SPREAD = {"expert_parallel": True}
# name -> codebook, targets, settings, and those of several processes. Llama 4 gives each expert rows of its own;
# "plain": experts that are not in 4 bits, without an adapter beside one of their stacks
CASES = {
    "Mixtral": ("nf4", "all", {}, SPREAD),
    "small": ("nf4", "experts", SMALL, SPREAD),
    "Llama4Text": ("nf4", "all", {"steps": 3}, SPREAD),
    "plain": (None, ["attention", "experts.down_proj"], {"steps": 3}, SPREAD),
    "ddp": ("nf4", "all", {"steps": 3}, {}),  # the other engines take adapters of experts, too
    "fsdp": ("nf4", "all", {"steps": 3}, {"shard": True}),
}


def load(folder, codebook="nf4", targets="all"):
    options = {"block_size": 16, "dtype": torch.float32, "device": "cpu", "progress": False}
    model, tokenizer = ql.load(folder, codebook, **options)
    return add_lora(model, r=4, targets=targets), tokenizer


def folder_of(folders, case):
    return folders / (case if case == "Llama4Text" else "Mixtral")


def result_of(folders, case, out, several=False):
    codebook, targets, settings, more = CASES[case]
    more = more if several else {}
    loaded = load(folder_of(folders, case), codebook, targets)
    before = bits(loaded[0])
    shapes = {name: type(module) for name, module in loaded[0].named_modules()}
    run = train(loaded, out / case, **settings | more)
    whole = {name: type(module) for name, module in loaded[0].named_modules()} == shapes
    return seen(run) | {"base_is_whole": whole and same(loaded[0], before), "adapter": out / case / "adapter"}


def stopped_and_resumed(folders, out):
    """The adapters of a run that was stopped after step 2 of 4, and of one that was not."""
    options = SPREAD | {"steps": 4}
    runs = [seen(train(load(folders / "Mixtral"), out / "uncut", **options))]
    train(load(folders / "Mixtral"), out / "cut", lambda run, line: line["step"] == 2 and run.stop(), **options)
    return [*runs, seen(train(load(folders / "Mixtral"), out / "cut", resume=True, **options))]


def packed_bytes(model):
    """Bytes of the packed stacks of this process."""
    own = [m for m in model.modules() if isinstance(m, Stack4bit)]
    own = {m.weight.packed.untyped_storage().data_ptr(): m.weight.packed.untyped_storage().nbytes() for m in own}
    return sum(own.values())


def uint8_bytes():
    """Bytes of all tensors that can hold packed weights, wherever they are, each memory once."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.dtype == torch.uint8]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def bytes_held(folders, out):
    loaded, held = load(folders / "Mixtral"), []
    whole = packed_bytes(loaded[0])
    everything = uint8_bytes()
    with engine_for(loaded[0], expert_parallel=True):
        held.append(packed_bytes(loaded[0]))
        freed = everything - uint8_bytes()
    return {"whole": whole, "held": [*held, packed_bytes(loaded[0])], "freed": freed}


def errors(folders, out, rank):
    """What a failing step, and a model of three experts, raise; whether the base is whole afterwards."""
    raised = {}

    def fail(*_):
        raise ArithmeticError("in the midst of a run")

    for name, place, each in (("step", "Mixtral", fail), ("three", "three", lambda *_: None)):
        loaded = load(folders / place)
        before = bits(loaded[0])
        try:
            train(loaded, out / "errors" / name, each, expert_parallel=True, steps=2)
        except Exception as error:
            raised[name] = type(error).__name__, str(error), same(loaded[0], before)
    return raised


def main(folders: Path, out: Path) -> None:
    torch.set_num_threads(1)
    with processes() as rank:
        results = {case: result_of(folders, case, out / "two", several=True) for case in CASES}
        results |= {
            "resumed": stopped_and_resumed(folders, out),
            "bytes": bytes_held(folders, out),
            "errors": errors(folders, out, rank),
        }
        torch.save(results, out / f"{rank}.pt")
        by_command(folders, out, rank)


def by_command(folders, out, rank):
    """The command line, in the group that is there: gloo cannot begin a second one in the same processes."""
    distributed.processes = lambda: nullcontext(rank)
    options = ["--model", folders / "Mixtral", "--data", out / "data.jsonl", "--held-out", 0, "--steps", 1, "--r", 2]
    options += ["--targets", "attention", "experts", "--expert-parallel", "--quiet", "--out", out / "by command"]
    assert cli.main([str(a) for a in ["finetune", *options]]) == 0


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture
def folders(tmp_path, tokenizer):
    for name, family, options in (
        ("Mixtral", "Mixtral", {}),
        ("three", "Mixtral", {"num_local_experts": 3, "num_hidden_layers": 1}),
        ("Llama4Text", "Llama4Text", {}),
    ):
        tiny(family, vocab_size=len(tokenizer), initializer_range=0.3, **options).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_with_half_of_the_experts_do_what_one_does(folders, tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(TRAIN % (i, 2 * i) for i in range(12)))
    done = torchrun("-m", __name__, folders, tmp_path)
    assert done.returncode == 0, done.stderr
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(SIZE)]
    for case in CASES:
        one = result_of(folders, case, tmp_path / "one")
        first, second = (results[case] for results in both)
        assert one["losses"][-1] < one["losses"][0]
        torch.testing.assert_close(first["losses"], one["losses"], rtol=0, atol=1e-4)
        torch.testing.assert_close(first["held_out"], one["held_out"], rtol=0, atol=1e-4)
        torch.testing.assert_close(first["adapters"], one["adapters"], rtol=0, atol=1e-4)
        assert first["base_is_whole"] and second["base_is_whole"], case
        equal(first, second)
    whole = ql.load_adapter(load(folders / "Mixtral")[0], both[0]["Mixtral"]["adapter"])  # of both halves
    saved = {n: p for n, p in whole.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, saved[n]) for n, p in both[1]["Mixtral"]["adapters"].items())
    for results in both:
        equal(*results["resumed"])
        figures = results["bytes"]
        assert figures["held"] == [figures["whole"] // 2, figures["whole"]]
        assert figures["freed"] >= figures["whole"] // 2  # the other half lies nowhere else
        assert results["errors"]["step"] == ("ArithmeticError", "in the midst of a run", True)
        kind, words, is_whole = results["errors"]["three"]
        assert kind == "ValueError" and is_whole
        assert "layers.0.mlp.experts has 3 experts for 2 processes: start a number of them that divides 3" in words
    assert (tmp_path / "by command" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_model_without_experts_and_a_number_that_cannot_be_shared(tiny_llama):
    with pytest.raises(ValueError, match="LlamaForCausalLM has none in one tensor: leave it out, or use shard"):
        check_experts(tiny_llama, 2)
    check_experts(tiny("Mixtral", num_hidden_layers=1), 4)
    with pytest.raises(ValueError, match="has 4 experts for 3 processes: start a number of them that divides 4"):
        check_experts(tiny("Mixtral", num_hidden_layers=1), 3)


def test_what_excludes_it_is_refused(capsys, tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="shard and expert_parallel exclude each other"):
        Settings(shard=True, expert_parallel=True)
    alone = "expert_parallel spreads the experts .* the only one: start several with"
    with pytest.raises(ValueError, match=alone), engine_for(tiny_llama, expert_parallel=True):
        pass
    (tmp_path / "data.jsonl").write_text(TRAIN % (1, 2))
    argv = ["finetune", "--model", "nowhere", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "run"]
    for more, fault in (
        (["--expert-parallel"], "this is the only one"),
        (["--expert-parallel", "--method", "full", "--codebook", "none"], "method full freezes none: leave it out"),
    ):
        assert cli.main([str(a) for a in [*argv, *more]]) == 2 and fault in capsys.readouterr().err


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_part_of_a_stack_multiplies_as_the_whole(double_quant):
    """The experts keep their numbers, and their bits; an adapter beside them stays whole."""
    weight = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(0))
    stack = Stack4bit(quantize_stack(weight, block_size=16, double_quant=double_quant))
    part = StackPart(Stack4bit(_with_parts(stack.weight, lambda tensor: tensor[2:].clone())), first=2)
    assert part.weight.nbytes == stack.weight.nbytes // 2
    x = torch.ones(3, 16)
    assert torch.equal(part(x, 3), stack(x, 3))
    both = []
    for base in (stack, part):
        layer = LoRAStack(stack, 2, 2, generator=torch.Generator().manual_seed(1))
        layer.lora_B.data.fill_(0.1)
        layer.base = base
        both.append(layer(x, 2))
    assert torch.equal(*both) and not torch.equal(both[0], stack(x, 2))


def test_an_exchange_answers_in_the_order_of_the_rows(monkeypatch):
    """Two processes by turns, in one: what one sends is what the other receives."""
    n, rows = 4, {0: torch.tensor([0, 0, 2, 3]), 1: torch.tensor([1, 2, 2])}  # rank -> the expert of each row
    counts = {rank: torch.bincount(chosen, minlength=n) for rank, chosen in rows.items()}
    x = {rank: torch.stack([chosen, torch.full_like(chosen, rank)], 1).float() for rank, chosen in rows.items()}
    given = []

    def all_to_all(out, sent, *splits):
        if not splits:  # counts: (to process, its expert)
            out.copy_(torch.stack([counts[0][:2], counts[1][:2]]))
        elif not given:  # rows for experts 0 and 1
            out.copy_(torch.cat([x[0][:2], x[1][:1]]))
            given.append(sent)
        else:  # answers: to process 0 its own two; the first half of them came from here
            given.append(sent)
            out.copy_(torch.cat([sent[:2], 10 * x[0][2:]]))

    monkeypatch.setattr(expert_parallel.dist, "all_to_all_single", all_to_all)
    seen_counts = []
    y = Exchange(n, 0, 2)(x[0], counts[0].tolist(), lambda rows, counts: seen_counts.append(counts) or 10 * rows)
    assert seen_counts == [[2, 1, 0, 0]]
    assert torch.equal(y, 10 * x[0]) and torch.equal(given[0], x[0]) and y.requires_grad
    assert torch.equal(given[1], 10 * torch.cat([x[0][:2], x[1][:1]]))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
