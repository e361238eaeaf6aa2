"""The loop: it learns, it repeats itself, it logs every step, it leaves the base and the surroundings alone."""

import json
import re
import signal
from copy import deepcopy
from inspect import signature

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import qlora_lab as ql
from qlora_lab.adapters.lora import adapters, add_lora
from qlora_lab.cli import build_parser
from qlora_lab.data.examples import Example
from qlora_lab.files.ownership import RUN, mark
from qlora_lab.model.linear4bit import quantize_linears
from qlora_lab.train.checkpoint import saved_steps
from qlora_lab.train.loss import answer_loss
from qlora_lab.train.settings import Settings, learning_rate
from qlora_lab.train.trainer import Training, finetune
from tests.model.families import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = [Example((("user", f"{i} and {i}"), ("assistant", "two" if i % 2 else "too"))) for i in range(12)]

LONGER = [Example((("user", "1 and " * 30), ("assistant", "one")))]


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


def test_the_last_answer_alone_is_learned_where_that_is_asked(model, tokenizer, tmp_path):
    chat = [{"role": role, "content": "one"} for role in ("user", "assistant") * 2]
    both, last = (
        Training(
            model,
            tokenizer,
            [{"messages": chat}],
            tmp_path / str(only),
            Settings(last_answer_only=only),
            progress=False,
        ).report
        for only in (False, True)
    )
    assert last.tokens == both.tokens and 2 * last.learned_tokens == both.learned_tokens


def test_records_that_cannot_be_used_are_skipped_and_reported(model, tokenizer, tmp_path):
    record = {"instruction": "1 and 1", "output": "two"}
    data = {"data": [{}, record], "held_out": [record, {}], "eval_every": 1, "steps": 1}
    with pytest.raises(ValueError, match="record 2: the record has the keys"):
        train(model, tokenizer, tmp_path / "run", **data)
    with pytest.warns(UserWarning, match="1 record was skipped"):
        run = train(model, tokenizer, tmp_path / "run", skip_bad=True, **data)
    assert (run.data.kept, len(run.data.skipped)) == (1, 1) and "record 1: " in run.data.skipped[0]
    assert "skipped" not in (tmp_path / "run" / "settings.json").read_text("utf-8")


def test_the_same_seed_gives_the_same_run(tiny_llama, tokenizer, tmp_path):
    runs = []
    for i in range(2):
        torch.manual_seed(i)  # whatever was drawn before
        model = add_lora(deepcopy(tiny_llama), r=4, dropout=0.1)
        runs.append((train(model, tokenizer, tmp_path / str(i)).losses, adapters(model)))
    assert runs[0][0] == runs[1][0]
    for a, b in zip(runs[0][1].values(), runs[1][1].values(), strict=True):
        assert torch.equal(a.lora_A, b.lora_A) and torch.equal(a.lora_B, b.lora_B)


@pytest.mark.long
def test_measuring_in_between_changes_nothing(tiny_llama, tokenizer, tmp_path):
    """Evaluating and generating before, between and after training: no weight, no result, no byte differs."""
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


@pytest.mark.long
def test_what_a_run_leaves_behind(model, tokenizer, tmp_path):
    run = train(model, tokenizer, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines] == run.losses
    assert sum(line["tokens"] for line in lines) == run.tokens
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert (settings["lr"], settings["dtype"], settings["adapter"]["r"]) == (2e-2, "float32", 4)
    assert sorted(p.name for p in run.adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "qlora-lab.sha256",
    ]


@pytest.mark.long
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


@pytest.mark.long
def test_a_pad_token_without_an_embedding_changes_no_run(tiny_llama, tokenizer, tmp_path):
    """Users add [PAD] and no row for it. What fills rows is neither learned nor attended to: any token will do."""
    runs = []
    for name in ("own", "added"):
        if name == "added":
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        model = add_lora(deepcopy(tiny_llama), r=4)
        options = {"held_out": EXAMPLES[:3], "eval_every": 3}
        run = train(model, tokenizer, tmp_path / name, data=EXAMPLES + LONGER, **options)
        runs.append((run.losses, run.held_out))
    assert tokenizer.pad_token_id == tiny_llama.config.vocab_size and runs[0] == runs[1]


def test_held_out_examples_that_are_too_long_are_counted_in_a_warning(model, tokenizer, tmp_path):
    """A loss over fewer examples than were given is another figure."""
    with pytest.warns(
        UserWarning, match=r"1 of 4 examples have more than 64 tokens and do not count in the evaluations"
    ):
        run = train(model, tokenizer, tmp_path / "run", held_out=EXAMPLES[:3] + LONGER, eval_every=6, max_length=64)
    assert ql.held_out(model, tokenizer, EXAMPLES[:3]).loss == pytest.approx(run.held_out[-1][1], rel=1e-5)


def test_a_token_without_an_embedding_is_named_before_the_first_step(model, tokenizer, tmp_path):
    tokenizer.add_tokens(["<think>"])
    unreadable = Example((("user", "1"), ("assistant", "<think>")))
    for options in ({"data": [*EXAMPLES, unreadable]}, {"held_out": [unreadable], "eval_every": 1}):
        with pytest.raises(ValueError, match="'<think>' has id 280, but the embedding has 280 rows"):
            train(model, tokenizer, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_examples_beyond_the_positions(tokenizer, tmp_path):
    """Learned positions have an end; those that are computed do not, and get worse. Shorter examples are no matter."""
    stored, computed = (add_lora(tiny(family, vocab_size=280), r=2) for family in ("OPT", "Llama"))
    data, options = EXAMPLES + LONGER, {"steps": 1, "batch_size": 16}
    with pytest.raises(ValueError, match=r"an example has \d+ tokens, but OPTForCausalLM stores 64 positions"):
        train(stored, tokenizer, tmp_path / "run", data=data, **options)
    with pytest.warns(UserWarning, match=r"an example has \d+ tokens, but LlamaForCausalLM was made for 64 positions"):
        train(computed, tokenizer, tmp_path / "run", data=data, **options)
    run = train(stored, tokenizer, tmp_path / "short", data=data, max_length=64, **options)
    assert run.data.too_long == len(LONGER) and run.ended == "all steps"


@pytest.mark.long
def test_an_earlier_run_is_not_overwritten_unasked(model, tokenizer, tmp_path):
    train(model, tokenizer, tmp_path / "run")
    with pytest.raises(FileExistsError, match="holds an earlier run: choose another folder, or overwrite it"):
        train(model, tokenizer, tmp_path / "run")
    train(model, tokenizer, tmp_path / "run", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "adapter",
        "log.jsonl",
        "qlora-lab.json",
        "qlora-lab.sha256",
        "result.json",
        "settings.json",
    ]
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file: name a folder"):
        train(model, tokenizer, tmp_path / "file")


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.long
def test_a_failing_run_leaves_the_earlier_one_as_it_was(model, tokenizer, tmp_path):
    train(model, tokenizer, tmp_path / "run")
    before = contents(tmp_path / "run")
    next(iter(adapters(model).values())).lora_B.data.fill_(torch.inf)
    with pytest.raises(FloatingPointError):
        train(model, tokenizer, tmp_path / "run", overwrite=True)
    assert contents(tmp_path / "run") == before


@pytest.mark.long
def test_an_interrupt_ends_the_step_saves_and_says_how_to_go_on(model, tokenizer, tmp_path):
    def interrupt_in(step):
        for line in training:
            if line["step"] == step - 1:  # a signal in the middle of the next forward
                hook = model.model.norm.register_forward_hook(lambda *_: signal.raise_signal(signal.SIGINT))
            elif line["step"] == step:
                hook.remove()

    before = signal.getsignal(signal.SIGINT)
    training = Training(model, tokenizer, EXAMPLES, tmp_path / "run", Settings(steps=6, batch_size=4), progress=False)
    interrupt_in(3)
    assert training.result.ended == "asked to stop" and len(training.result.losses) == 3
    assert saved_steps(tmp_path / "run") == [3] and training.result.adapter.is_dir()
    assert signal.getsignal(signal.SIGINT) is before
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(FileExistsError, match="saved at step 3: resume it"):
        train(model, tokenizer, tmp_path / "run")


@pytest.mark.long
def test_an_interrupt_reaches_who_called(model, tokenizer, tmp_path):
    hook = model.model.norm.register_forward_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(
        KeyboardInterrupt, match=r"stopped after step 1 of 6, all of it saved in .*run: continue with res"
    ):
        train(model, tokenizer, tmp_path / "run")
    hook.remove()
    assert train(model, tokenizer, tmp_path / "run", resume=True).ended == "all steps"


def test_a_second_interrupt_stops_at_once(model, tokenizer, tmp_path):
    def twice(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    model.model.norm.register_forward_hook(twice)
    with pytest.raises(KeyboardInterrupt):
        train(model, tokenizer, tmp_path / "run")
    assert (tmp_path / "run" / "log.jsonl").read_text() == ""


@pytest.mark.long
def test_gradients_left_behind_are_not_added(tiny_llama, tokenizer, tmp_path):
    clean, dirty = (add_lora(deepcopy(tiny_llama), r=4) for _ in range(2))
    for parameter in dirty.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, torch.nan)
    assert train(clean, tokenizer, tmp_path / "a").losses == train(dirty, tokenizer, tmp_path / "b").losses


@pytest.mark.long
def test_short_examples_are_found_among_long_ones(model, tokenizer, tmp_path):
    long = [Example((("user", "word " * 300), ("assistant", "no"))) for _ in range(40)]
    run = train(model, tokenizer, tmp_path / "run", data=long + EXAMPLES[:3] + long, steps=1, batch_size=3)
    assert (run.data.kept, run.data.too_long > 0) == (3, True)


def test_memory_is_recycled_where_the_c_library_can():
    import platform

    from qlora_lab.train.allocator import recycle_memory

    assert recycle_memory() == (platform.libc_ver()[0] == "glibc")


def test_a_loss_that_is_not_finite_stops_the_run(model, tokenizer, tmp_path):
    next(iter(adapters(model).values())).lora_B.data.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="step 1: loss nan") as error:
        train(model, tokenizer, tmp_path / "run")
    assert str(error.value).endswith(". Try to lower lr=0.02 (--lr)")  # it computes in float32 already
    assert not (tmp_path / "run" / "adapter").exists()
    assert all(p.grad is None for p in model.parameters())


def test_what_is_advised_after_a_loss_that_is_not_finite_can_be_done(tiny_llama, tokenizer, tmp_path):
    model = add_lora(tiny_llama.bfloat16(), r=4)
    next(iter(adapters(model).values())).lora_B.data.fill_(torch.inf)
    with pytest.raises(FloatingPointError) as error:
        train(model, tokenizer, tmp_path / "run")
    advice = "Load the model with dtype=torch.float32 (--dtype float32), or lower lr=0.02 (--lr)"
    assert str(error.value).endswith(advice)
    options = re.findall(r"--[a-z]+(?: [a-z0-9]+)?", advice)
    words = " ".join(options).replace("--lr", "--lr 1e-5").split()
    arguments = build_parser().parse_args(["finetune", *words])
    assert (arguments.dtype, arguments.lr) == ("float32", 1e-5)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"schedule": "linear"}, "schedule='linear' is not known: choose constant or cosine"),
        ({"warmup_steps": 6}, "warmup_steps=6 leaves none of the 6 steps at the full rate: lower warmup_steps"),
        ({"optimizer_bits": 16}, "optimizer_bits=16 is not allowed: moments have 32 or 8 bits"),
        ({"patience": 2}, "patience=2 needs evaluations: set eval_every as well"),
        ({"packing": True, "group_by_length": True}, "exclude each other, because both save padding: choose one"),
        ({"eval_every": 2}, "eval_every=2 needs held-out examples: there are none"),
        ({"held_out": EXAMPLES[:2]}, "held_out has 2 examples, but eval_every=0 evaluates none: set eval_every"),
        ({"micro_batch_size": 0}, "micro_batch_size=0 is not allowed: it is a whole number of at least 1"),
        ({"overwrite": True, "resume": True}, "overwrite and resume exclude each other"),
        ({"steps": 0}, "steps=0 is not allowed: it is a whole number of at least 1"),
        ({"batch_size": 2.5}, "batch_size=2.5 is not allowed"),
        ({"lr": 0}, "lr=0 is not allowed: it is a number above 0"),
        ({"lr": 1e7}, "lr=10000000.0 is not allowed: it is a number above 0 and at most 1,000,000"),
        ({"clip": float("nan")}, "clip=nan is not allowed"),
        ({"max_length": 3}, "no example has at most 3 tokens"),
        ({"data": "no/such/file.jsonl"}, "no/such/file.jsonl"),
    ],
)
def test_errors_teach(model, tokenizer, tmp_path, kwargs, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(model, tokenizer, tmp_path / "run", **kwargs)


def test_a_model_without_adapter_is_refused(tiny_llama, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no adapter: call qlora_lab.add_adapter"):
        train(tiny_llama, tokenizer, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def gradients(model, tokenizer, **kwargs):
    """Of one step, before clipping: the gradient that the optimizer sees at a clip that cuts nothing off."""
    kept = {}

    def keep(optimizer, *_):
        numbers = range(len(optimizer.param_groups[0]["params"]))
        kept.update(zip(numbers, (p.grad.clone() for p in optimizer.param_groups[0]["params"]), strict=True))

    training = Training(
        model, tokenizer, EXAMPLES, kwargs.pop("out"), Settings(steps=1, clip=1e9, **kwargs), progress=False
    )
    hook = register_optimizer_step_pre_hook(keep)
    try:
        loss = training.run().losses[0]
    finally:
        hook.remove()
    return loss, kept


@pytest.mark.long
@pytest.mark.parametrize(
    "kwargs", [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"packing": True}, {"gradient_checkpointing": True}]
)
def test_a_step_is_the_same_however_it_is_cut(tiny_llama, tokenizer, tmp_path, kwargs):
    """Batch 8 equals 8 times batch 1, packed rows and gradient checkpointing: normalised by tokens, once."""
    models = [add_lora(quantize_linears(deepcopy(tiny_llama)), r=4) for _ in range(2)]
    for model in models:
        for layer in adapters(model).values():
            layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(0))
    want, whole = gradients(models[0], tokenizer, batch_size=8, out=tmp_path / "a")
    loss, cut = gradients(models[1], tokenizer, batch_size=8, out=tmp_path / "b", **kwargs)
    assert loss == pytest.approx(want, rel=1e-6)
    assert whole.keys() == cut.keys() and len(whole) == 28
    for number, gradient in whole.items():
        torch.testing.assert_close(cut[number], gradient, rtol=1e-4, atol=2e-5 * gradient.abs().max().item())


@pytest.mark.long
def test_a_mean_of_means_would_be_another_loss(tiny_llama, tokenizer, tmp_path):
    """So the test above can fail: these answers differ in length."""
    model = add_lora(tiny_llama, r=4)
    mixed = [Example((("user", "?"), ("assistant", "x" * n))) for n in (1, 30)]
    alone = [
        train(model, tokenizer, tmp_path / str(n), data=[one], steps=1, batch_size=1, lr=1e-30).losses[0]
        for n, one in enumerate(mixed)
    ]
    tokens = [json.loads((tmp_path / str(n) / "log.jsonl").read_text())["answer_tokens"] for n in (0, 1)]
    run = train(model, tokenizer, tmp_path / "run", data=mixed, steps=1, batch_size=2, micro_batch_size=1)
    weighted = sum(loss * n for loss, n in zip(alone, tokens, strict=True)) / sum(tokens)
    assert abs(weighted - sum(alone) / 2) > 0.01
    assert run.losses[0] == pytest.approx(weighted, rel=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_after_one_step_every_lora_B_has_moved(tiny_llama, tokenizer, tmp_path, checkpointing):
    model = add_lora(quantize_linears(tiny_llama), r=4)
    train(model, tokenizer, tmp_path / "run", steps=1, gradient_checkpointing=checkpointing)
    assert all(layer.lora_B.any() for layer in adapters(model).values())
    assert not model.is_gradient_checkpointing


@pytest.mark.long
def test_gradient_checkpointing_computes_layers_again(tiny_llama, tokenizer, tmp_path):
    model, calls = add_lora(tiny_llama, r=4), []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))  # recomputing ends within
    train(model, tokenizer, tmp_path / "a", steps=1)
    train(model, tokenizer, tmp_path / "b", steps=1, gradient_checkpointing=True)
    assert len(calls) == 1 + 2


@pytest.mark.long
def test_the_rate_of_each_step_is_the_schedules(model, tokenizer, tmp_path):
    run = train(model, tokenizer, tmp_path / "run", schedule="cosine", warmup_steps=2, lr=1e-3)
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == [learning_rate(run.settings, step) for step in range(1, 7)]
    assert lines[0]["lr"] < lines[1]["lr"] < lines[2]["lr"] == 1e-3 > lines[3]["lr"] > lines[5]["lr"] > 0


def test_the_rate_moves_the_optimizer(tiny_llama, tokenizer, tmp_path):
    """AdamW's first step is the rate, for every element whose gradient is well above eps."""
    model = add_lora(tiny_llama, r=4)
    for line in Training(
        model, tokenizer, EXAMPLES, tmp_path / "run", Settings(steps=4, warmup_steps=3, lr=0.4), progress=False
    ):
        moved = max(layer.lora_B.abs().max().item() for layer in adapters(model).values())
        assert line["lr"] == pytest.approx(0.1) and moved == pytest.approx(0.1, rel=1e-4)
        break


@pytest.mark.long
def test_evaluations_find_the_best_adapter(model, tokenizer, tmp_path):
    run = train(model, tokenizer, tmp_path / "run", steps=7, eval_every=3, held_out=EXAMPLES[:4], lr=5e-2)
    assert [step for step, _ in run.held_out] == [3, 6, 7]  # the last step is always evaluated
    best = min(run.held_out, key=lambda one: one[1])
    assert json.loads((run.folder / "result.json").read_text())["best"] == {
        "loss": best[1],
        "step": best[0],
        "since": [step for step, _ in run.held_out if step > best[0]].__len__(),
    }
    ql.load_adapter(model, run.best)
    assert ql.held_out(model, tokenizer, EXAMPLES[:4]).loss == pytest.approx(best[1], rel=1e-5)


@pytest.mark.long
def test_a_run_that_gets_no_better_stops_early(model, tokenizer, tmp_path):
    wrong = [Example((("user", f"{i} and {i}"), ("assistant", "two"[::-1]))) for i in range(4)]  # of what is learned
    run = train(model, tokenizer, tmp_path / "run", steps=40, eval_every=1, patience=2, held_out=wrong, lr=5e-2)
    losses = [loss for _, loss in run.held_out]
    best = losses.index(min(losses))
    assert run.ended == "early stopping" and len(run.losses) == best + 3 < 40
    assert (run.folder / "result.json").is_file()


@pytest.mark.long
@pytest.mark.parametrize("options", [{"optimizer_budget": 2**21}, {"optimizer_bits": 8}])
def test_paged_and_8_bit_optimizers_train(tiny_llama, tokenizer, tmp_path, options):
    a, b = (add_lora(deepcopy(tiny_llama), r=4) for _ in range(2))
    run = train(a, tokenizer, tmp_path / "a", steps=20, **options)
    plain = train(b, tokenizer, tmp_path / "b", steps=20)
    if "optimizer_budget" in options:
        assert run.losses == plain.losses
    else:
        assert run.losses != plain.losses and run.losses[-1] < 0.7 * run.losses[0]


@pytest.mark.long
def test_float16_is_scaled_and_an_overflow_skips_a_step(tiny_llama, tokenizer, tmp_path):
    model = add_lora(tiny_llama.half(), r=4)
    training = Training(model, tokenizer, EXAMPLES, tmp_path / "run", Settings(steps=12, lr=2e-2), progress=False)
    scales = []
    for line in training:
        scales.append((training._state.scaler.get_scale(), line["gradient_norm"]))
        moved = any(layer.lora_B.any() for layer in adapters(model).values())
        assert moved == any(norm is not None for _, norm in scales)
    skipped = [norm is None for _, norm in scales]
    assert skipped[0] and not skipped[-1]  # it begins at 65,536, too much for these gradients, and is halved until fine
    assert [a[0] / b[0] for a, b in zip(scales, scales[1:], strict=False)] == [2.0 if s else 1.0 for s in skipped[1:]]
    losses = training.result.losses
    assert losses[-1] < losses[0]


def test_a_run_is_made_step_by_step_and_stopped(model, tokenizer, tmp_path):
    training = Training(model, tokenizer, EXAMPLES, tmp_path / "run", Settings(steps=9, batch_size=4), progress=False)
    for line in training:
        if line["step"] == 2:
            training.stop()
    assert training.result.ended == "asked to stop" and len(training.result.losses) == 2
    assert saved_steps(tmp_path / "run") == [2]


def test_a_training_is_run_once(model, tokenizer, tmp_path):
    training = Training(model, tokenizer, EXAMPLES, tmp_path / "run", Settings(steps=1), progress=False)
    training.run()
    with pytest.raises(ValueError, match="this Training has already run: make a new one"):
        training.run()


def test_an_adapter_without_a_checkpoint_is_not_overwritten_by_a_resume(model, tokenizer, tmp_path):
    ql.save_adapter(model, tmp_path / "run" / "adapter")
    mark(tmp_path / "run", RUN)
    with pytest.raises(FileExistsError, match="holds an adapter and no checkpoint to resume from"):
        train(model, tokenizer, tmp_path / "run", resume=True)


def test_a_stop_before_the_first_step_ends_after_it(model, tokenizer, tmp_path):
    training = Training(model, tokenizer, EXAMPLES, tmp_path / "run", Settings(steps=3), progress=False)
    training.stop()
    assert [line["step"] for line in training] == [1] and training.result.ended == "asked to stop"


@pytest.mark.long
def test_a_failed_overwrite_puts_the_earlier_run_back_whole(tiny_llama, tokenizer, tmp_path):
    """Both runs have a best/; of the failed one nothing may be left among the earlier one's files."""
    model = add_lora(tiny_llama, r=4)
    options = {"eval_every": 1, "held_out": EXAMPLES[:2]}
    train(model, tokenizer, tmp_path / "run", steps=2, save_every=1, **options)
    before = contents(tmp_path / "run")
    training = Training(
        model, tokenizer, EXAMPLES, tmp_path / "run", Settings(steps=3, eval_every=1), held_out=EXAMPLES[:2],
        overwrite=True, progress=False,
    )  # fmt: skip
    with pytest.raises(FloatingPointError):
        for _ in training:
            next(iter(adapters(model).values())).lora_B.data.fill_(torch.inf)
    assert contents(tmp_path / "run") == before


def test_what_would_be_trained_and_not_saved_is_refused(model, tokenizer, tmp_path):
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="model.norm.weight would be trained as well, but adapters alone"):
        train(model, tokenizer, tmp_path / "run")


def test_adapters_that_get_no_gradient_stop_the_run(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: (x @ self.weight.t()).detach())  # the head
    with pytest.raises(ValueError, match="no adapter got a gradient, so nothing would be learned"):
        train(model, tokenizer, tmp_path / "run")


@pytest.mark.long
def test_a_stop_and_then_one_interrupt_is_still_a_stop(model, tokenizer, tmp_path):
    training = Training(model, tokenizer, EXAMPLES, tmp_path / "run", Settings(steps=5), progress=False)
    for line in training:
        if line["step"] == 2:
            training.stop()
            signal.raise_signal(signal.SIGINT)
    assert training.result.ended == "asked to stop" and saved_steps(tmp_path / "run") == [2]


def test_all_that_is_written_is_json(model, tokenizer, tmp_path):
    def strict(text):
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    train(model, tokenizer, tmp_path / "run", steps=2, save_every=1)
    for path in (tmp_path / "run").rglob("*.json"):
        strict(path.read_text())
    assert strict((tmp_path / "run" / "result.json").read_text())["best"]["loss"] is None


def test_a_held_out_loss_that_is_not_finite_stops_the_run(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_lab.train.trainer.summed_loss", lambda *_: (float("nan"), 3))
    with pytest.raises(FloatingPointError, match="step 2: the held-out loss is nan; the last checkpoint is step 1 in"):
        train(model, tokenizer, tmp_path / "run", eval_every=2, save_every=1, held_out=EXAMPLES[:2])


@pytest.mark.long
def test_what_a_killed_process_left_is_swept(model, tokenizer, tmp_path):
    (tmp_path / "run").mkdir()
    scratch = tmp_path / "run" / mark(tmp_path / "run", RUN)
    (scratch / ".best-abc" / "new").mkdir(parents=True)
    (scratch / ".log.jsonl-abc").mkdir()
    train(model, tokenizer, tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*"))


def test_the_signature_of_finetune_names_every_keyword():
    """It takes each field of Settings and each keyword of Training, with their defaults, and nothing else."""
    taken = signature(finetune).parameters
    defaults = {name: p.default for name, p in signature(Settings).parameters.items()}
    defaults |= {name: p.default for name, p in signature(Training).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert {name: taken[name].default for name in defaults} == defaults
    assert set(taken) == {"model", "tokenizer", "data", "out", *defaults}
    assert not any(p.kind is p.VAR_KEYWORD for p in taken.values())
