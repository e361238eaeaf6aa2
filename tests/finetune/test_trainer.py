"""The loop: it learns, it repeats itself, it logs every step, it leaves the base and the surroundings alone."""

import json

import pytest
import torch

import qlora_lab as ql
from qlora_lab.finetune.examples import Example
from qlora_lab.finetune.linear4bit import quantize_linears
from qlora_lab.finetune.lora import adapters, add_lora
from qlora_lab.finetune.loss import answer_loss
from qlora_lab.finetune.trainer import finetune

EXAMPLES = [Example((("user", f"{i} and {i}"), ("assistant", "two" if i % 2 else "too"))) for i in range(12)]


@pytest.fixture
def model(tiny_llama):
    return add_lora(quantize_linears(tiny_llama), r=4, dropout=0.1)


def train(model, tokenizer, folder, **kwargs):
    kwargs = {"data": EXAMPLES, "steps": 6, "batch_size": 4, "lr": 2e-2, "progress": False, **kwargs}
    return finetune(model, tokenizer, out=folder, **kwargs)


def test_it_learns_and_only_the_adapter_moves(model, tokenizer, tmp_path):
    base = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    packed = {n: m.weight.packed.clone() for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    run = train(model, tokenizer, tmp_path / "run", steps=40)
    assert run.losses[-1] < 0.5 * run.losses[0]
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    assert all(torch.equal(model.get_submodule(n).weight.packed, p) for n, p in packed.items())
    assert all(layer.lora_B.any() for layer in adapters(model).values())


def test_the_same_seed_gives_the_same_run(tiny_llama, tokenizer, tmp_path):
    from copy import deepcopy

    runs = []
    for i in range(2):
        torch.manual_seed(i)  # whatever was drawn before
        model = add_lora(deepcopy(tiny_llama), r=4, dropout=0.1)
        runs.append((train(model, tokenizer, tmp_path / str(i)).losses, adapters(model)))
    assert runs[0][0] == runs[1][0]
    for a, b in zip(runs[0][1].values(), runs[1][1].values(), strict=True):
        assert torch.equal(a.lora_A, b.lora_A) and torch.equal(a.lora_B, b.lora_B)


def test_measuring_in_between_changes_nothing(tiny_llama, tokenizer, tmp_path):
    """Evaluating and generating before, between and after training: no weight, no result, no byte differs."""
    from copy import deepcopy

    results = []
    for measures in (True, False):
        model = add_lora(quantize_linears(deepcopy(tiny_llama)), r=4, dropout=0.1)

        def look(model=model, measures=measures):
            if measures:
                ql.held_out(model, tokenizer, EXAMPLES[:3])
                ql.generate(model, tokenizer, "1 and 1", max_new_tokens=4)

        look()
        first = train(model, tokenizer, tmp_path / f"{measures}1").losses
        look()
        second = train(model, tokenizer, tmp_path / f"{measures}2", seed=1).losses
        look()
        results.append((first, second, {n: v.clone() for n, v in model.state_dict().items()}))
    assert results[0][:2] == results[1][:2]
    assert results[0][2].keys() == results[1][2].keys()
    assert all(torch.equal(v, results[1][2][n]) for n, v in results[0][2].items())


def test_what_a_run_leaves_behind(model, tokenizer, tmp_path):
    run = train(model, tokenizer, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines] == run.losses
    assert sum(line["tokens"] for line in lines) == run.tokens
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert (settings["lr"], settings["dtype"], settings["adapter"]["r"]) == (2e-2, "float32", 4)
    assert sorted(p.name for p in run.adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_training_flags_and_random_state_return(model, tokenizer, tmp_path):
    model.model.layers[0].train()
    flags, state = {m: m.training for m in model.modules()}, torch.get_rng_state()
    train(model, tokenizer, tmp_path / "run")
    assert {m: m.training for m in model.modules()} == flags and torch.equal(torch.get_rng_state(), state)


def test_the_loss_is_the_mean_over_answer_tokens(tiny_llama):
    labels = torch.full((2, 9), -100)
    labels[0, 5:8], labels[1, 3] = torch.tensor([4, 5, 6]), 7
    batch = {"input_ids": torch.arange(18).view(2, 9) + 3, "attention_mask": torch.ones(2, 9), "labels": labels}
    summed, count = answer_loss(tiny_llama, batch)
    want = tiny_llama(**batch).loss  # transformers' own mean over labels
    assert count == 4
    torch.testing.assert_close(summed / count, want)


def test_an_earlier_run_is_not_overwritten_unasked(model, tokenizer, tmp_path):
    train(model, tokenizer, tmp_path / "run")
    with pytest.raises(FileExistsError, match="holds an earlier run: choose another folder, or overwrite it"):
        train(model, tokenizer, tmp_path / "run")
    train(model, tokenizer, tmp_path / "run", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["adapter", "log.jsonl", "settings.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file: name a folder"):
        train(model, tokenizer, tmp_path / "file")


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_failing_run_leaves_the_earlier_one_as_it_was(model, tokenizer, tmp_path):
    train(model, tokenizer, tmp_path / "run")
    before = contents(tmp_path / "run")
    next(iter(adapters(model).values())).lora_B.data.fill_(torch.inf)
    with pytest.raises(FloatingPointError):
        train(model, tokenizer, tmp_path / "run", overwrite=True)
    assert contents(tmp_path / "run") == before


def test_an_interrupt_saves_what_was_learned(model, tokenizer, tmp_path, monkeypatch):
    from qlora_lab.finetune import trainer

    step, done = trainer._step, []

    def interrupted(*args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(step(*args))
        return done[-1]

    monkeypatch.setattr(trainer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, tokenizer, tmp_path / "run")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2
    assert all(p.grad is None for p in model.parameters())


def test_gradients_left_behind_are_not_added(tiny_llama, tokenizer, tmp_path):
    from copy import deepcopy

    clean, dirty = (add_lora(deepcopy(tiny_llama), r=4) for _ in range(2))
    for parameter in dirty.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, torch.nan)
    assert train(clean, tokenizer, tmp_path / "a").losses == train(dirty, tokenizer, tmp_path / "b").losses


def test_short_examples_are_found_among_long_ones(model, tokenizer, tmp_path):
    long = [Example((("user", "word " * 300), ("assistant", "no"))) for _ in range(40)]
    run = train(model, tokenizer, tmp_path / "run", data=long + EXAMPLES[:3] + long, steps=1, batch_size=3)
    assert (run.data.kept, run.data.too_long > 0) == (3, True)


def test_memory_is_recycled_where_the_c_library_can():
    import platform

    from qlora_lab.finetune.allocator import recycle_memory

    assert recycle_memory() == (platform.libc_ver()[0] == "glibc")


def test_a_loss_that_is_not_finite_stops_the_run(model, tokenizer, tmp_path):
    next(iter(adapters(model).values())).lora_B.data.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="step 1: loss nan"):
        train(model, tokenizer, tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"steps": 0}, "steps=0 is not allowed: it is a whole number of at least 1"),
        ({"batch_size": 2.5}, "batch_size=2.5 is not allowed"),
        ({"lr": 0}, "lr=0 is not allowed: it is a number above 0"),
        ({"clip": float("nan")}, "clip=nan is not allowed"),
        ({"max_length": 3}, "no example has at most 3 tokens"),
        ({"data": "no/such/file.jsonl"}, "no/such/file.jsonl"),
    ],
)
def test_errors_teach(model, tokenizer, tmp_path, kwargs, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(model, tokenizer, tmp_path / "run", **kwargs)


def test_a_model_without_adapter_is_refused(tiny_llama, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no adapter: call qlora_lab.add_lora"):
        train(tiny_llama, tokenizer, tmp_path / "run")
    assert not (tmp_path / "run").exists()
