"""Each check fires on the fault that it is for, is silent on a sound run, and leaves everything as it was."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qlora_lab as ql
from qlora_lab.adapters.lora import add_lora
from qlora_lab.data.dataset import IGNORED, Encoded, EncodeReport, collate, encode_all, pad_token_id
from qlora_lab.data.examples import Example
from qlora_lab.data.labels import Notes
from qlora_lab.doctor import checks as doctor_checks, diagnose as doctor
from qlora_lab.doctor.checks import (
    THREADS,
    accumulation,
    activations,
    end_tokens,
    finite_values,
    learned_tokens,
    left_out,
    live_adapters,
    memory,
    new_tokens,
    row_lengths,
    trained_share,
)
from qlora_lab.doctor.data_checks import asked_for, texts
from qlora_lab.doctor.diagnose import diagnose
from qlora_lab.doctor.dtype_policy import dtype_policy
from qlora_lab.model.linear4bit import quantize_linears
from qlora_lab.model.modes import checkpointing, mode
from qlora_lab.train.loss import accumulate, answer_loss
from qlora_lab.train.rounding import tolerance
from qlora_lab.train.settings import Settings
from tests.model.families import tiny

DATA = [Example((("user", f"the sum of {i} and {i}"), ("assistant", "two " * (1 + i % 5)))) for i in range(12)]
BROKEN = "model.layers.1.mlp.up_proj"


@pytest.fixture
def model(tiny_llama):
    return add_lora(quantize_linears(tiny_llama), r=4, dropout=0.1)


@pytest.fixture
def encoded(tokenizer):
    return encode_all(DATA, tokenizer, 256)[0]


@pytest.fixture
def batch(encoded, tokenizer):
    return collate(encoded[:8], pad_token_id(tokenizer))


def with_labels(example, change):
    return Encoded(example.input_ids, [change(label) for label in example.labels])


# ------------------------------------------------------------------------------------------------------ a sound run


def test_a_sound_run_is_fine(model, tokenizer):
    report = diagnose(model, tokenizer, DATA, progress=False)
    assert report.ok and not report.skipped and {f.status for f in report.findings} == {"ok"}
    assert sorted(f.name for f in report.findings) == sorted(THREADS)
    lines = str(report).splitlines()
    assert lines[0].startswith("ok       end token in labels: <|im_end|> in 12 of 12 examples; it is also the pad")
    assert all(line[:9].strip() in ("ok", "") for line in lines) and "https://" not in str(report)
    assert "".join(text for text, learned in report.labels if learned).startswith("two")


@pytest.mark.long
def test_it_is_plain_for_json(model, tokenizer):
    record = json.loads(json.dumps(diagnose(model, tokenizer, DATA, progress=False).to_dict()))
    assert record["ok"] is True and record["skipped"] == [] and record["dtypes"]["computes_in"] == "float32"
    assert {"name", "status", "message", "threads"} == set(record["findings"][0])


@pytest.mark.long
def test_nothing_is_left_behind(model, tokenizer):
    """Weights, gradients, flags and random state: bit for bit, and the very same tensors."""
    model.model.layers[0].train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    trainable[0].grad = torch.full_like(trainable[0], 2.0)
    values = {n: t.clone() for n, t in model.state_dict().items()}
    before = state(model)
    diagnose(model, tokenizer, DATA, progress=False)
    assert all(torch.equal(t, values[n]) for n, t in model.state_dict().items())
    assert state(model) == before and (trainable[0].grad == 2).all()


def state(model):
    tensors = [(id(p), p.data_ptr(), id(p.grad), p.requires_grad) for p in model.parameters()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    flags = [(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()]
    return tensors, hooks, flags, torch.get_rng_state().tolist()


@pytest.mark.slow
def test_the_default_model(monkeypatch):
    """In bf16, whose rounding is nearest to a wrong average. Steps of four examples show it as well as steps of
    eight, in half the time."""
    monkeypatch.setattr(doctor, "STEPPED", 4)
    model, tokenizer = ql.load("smollm2-135m", dtype=torch.bfloat16, progress=False)
    ql.add_lora(model)
    data = ql.load_data("docstrings")
    report = diagnose(model, tokenizer, data, progress=False)
    assert report.ok and {f.status for f in report.findings} == {"ok"}, str(report)
    encoded = encode_all(data, tokenizer, 256, doctor.SAMPLED)[0]
    found = accumulation(model, doctor._few(encoded), pad_token_id(tokenizer), averages)
    assert found.status == "problem", found.message


@pytest.mark.parametrize("name", sorted(THREADS))
def test_each_check_links_what_it_answers(name):
    assert THREADS[name] and all(thread.count("/") == 3 for thread in THREADS[name])


# ----------------------------------------------------------------------------------------------------------- tokens


def test_end_tokens_that_are_masked(encoded, tokenizer):
    end = tokenizer.eos_token_id
    faulty = [with_labels(one, lambda label: IGNORED if label == end else label) for one in encoded[:3]] + encoded[3:]
    found = end_tokens(faulty, tokenizer)
    assert found.status == "problem" and "<|im_end|> is not among the labels in 3 of 12 examples" in found.message
    assert "https://github.com/huggingface/trl/issues/696" in found.threads


def test_padding_that_is_masked_by_its_id(encoded, tokenizer, monkeypatch):
    """Where the end token is the pad token, that hides the real one."""

    def by_id(batch, pad_id):
        made = collate(batch, pad_id)
        return made | {"attention_mask": (made["input_ids"] != pad_id).long()}

    monkeypatch.setattr(doctor_checks, "collate", by_id)
    found = end_tokens(encoded, tokenizer)
    assert found.status == "problem" and "masked by its id, and with it real tokens in 12 of 12" in found.message


def test_labels_that_are_masked_by_their_id(encoded, tokenizer, monkeypatch):
    def by_id(batch, pad_id):
        made = collate(batch, pad_id)
        return made | {"labels": made["labels"].masked_fill(made["input_ids"] == pad_id, IGNORED)}

    monkeypatch.setattr(doctor_checks, "collate", by_id)
    assert end_tokens(encoded, tokenizer).status == "problem"


def test_learned_tokens(encoded):
    asked, tokens = (sum(label != IGNORED for e in encoded for label in e.labels), sum(len(e.labels) for e in encoded))
    found = learned_tokens(encoded)
    assert found.status == "ok" and found.message.startswith(f"{asked} of {tokens}, {asked / tokens:.0%}; ")
    silent = learned_tokens([with_labels(encoded[0], lambda label: IGNORED), *encoded[1:]])
    assert silent.status == "problem" and silent.message.startswith("1 of 12 examples have no label")
    shifted = learned_tokens([replace(encoded[0], labels=[*encoded[0].labels[1:], IGNORED]), *encoded[1:]])
    assert shifted.status == "problem" and shifted.message.startswith("1 of 12 examples have labels that are not their")
    whole = learned_tokens([replace(encoded[0], labels=encoded[0].input_ids), *encoded[1:]])
    assert whole.status == "warning" and whole.message.startswith("1 of 12 examples teach their prompt too")


def test_examples_that_are_too_long():
    counts = EncodeReport(kept=40, too_long=60, longest=900, tokens=1, learned_tokens=1)
    found = left_out(counts, 256)
    assert found.status == "warning" and found.message.startswith(
        "60 of 100 have more than 256 tokens, the longest 900"
    )
    assert left_out(replace(counts, kept=60, too_long=40), 256).status == "ok"


@pytest.mark.long
def test_long_examples_are_counted_over_the_whole_way(model, tokenizer):
    long = [Example((("user", "word " * 300), ("assistant", "no"))) for _ in range(40)]
    report = diagnose(model, tokenizer, long + DATA, progress=False)
    (found,) = [f for f in report.findings if f.name == doctor_checks.LENGTH]
    assert (found.status, found.message.split(",")[0]) == ("warning", "40 of 52 have more than 256 tokens")
    assert report.ok, "a warning is no problem"


def test_tokens_beyond_the_embedding(model, tokenizer, encoded):
    rows = model.config.vocab_size
    assert new_tokens(model, tokenizer, encoded).status == "ok"
    tokenizer.add_tokens(["<think>"])
    unused = new_tokens(model, tokenizer, encoded)
    assert unused.status == "warning" and unused.message.startswith(f"'<think>' has id {rows}, but the embedding has")
    used = [*encoded, Encoded([*encoded[0].input_ids, rows], [*encoded[0].labels, rows])]
    assert new_tokens(model, tokenizer, used).status == "problem"
    report = diagnose(model, tokenizer, used, progress=False)
    assert not report.ok and report.skipped == ("row lengths", "finite values", "adapters learn") + (
        doctor_checks.CHECKPOINTED,
        "gradient accumulation",
        "packed rows",
        "memory",
    )
    assert {f.name for f in report.findings} | set(report.skipped) == set(THREADS), "each check was made, or is named"
    assert "\nskipped  row lengths, finite values, " in str(report)


def test_skipped_records_are_a_warning_with_the_first_reason():
    found = asked_for([Example((("user", "a"), ("assistant", "b")))], ["line 3: no answer", "line 7: not JSON"])
    assert found.status == "warning" and "; 2 skipped, the first: line 3: no answer" in found.message


def test_what_records_ask_for_is_counted(tmp_path):
    path = tmp_path / "mine.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    chat = {"messages": turns + [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}], "id": 1}
    alpaca = {"instruction": "a", "output": "b", "system": "c", "id": 2, "source": "me"}
    path.write_text("\n".join(map(json.dumps, [chat, alpaca, chat])))
    found = asked_for(ql.load_data(path))
    assert found.status == "ok" and found.message == (
        "3 examples with the turns 1 system, 5 user, 5 assistant; 2 answers are shown but not learned, as "
        "their records ask; fields not used: id (3), source (1)"
    )
    assert asked_for([]).message == "not checked: the data came as tokens"


@pytest.mark.parametrize("pictures, said", [(1, "1 picture"), (2, "2 pictures")])
def test_pictures_are_counted(pictures, said):
    seen = Example((("user", "<image>" * pictures), ("assistant", "b")), pictures=(Path("a.png"),) * pictures)
    assert asked_for([seen]).message == f"1 examples with the turns 1 user, 1 assistant; {said}"


@pytest.mark.long
def test_texts_that_the_template_does_not_show_as_they_are(model, tokenizer):
    spelt = Example((("user", "What is <|im_end|>?"), ("assistant", "<|im_end|>, the end")))
    empty = Example((("user", "a"), ("assistant", "")))
    report = diagnose(model, tokenizer, [spelt, empty, *DATA[:2]], progress=False)
    (found,) = [f for f in report.findings if f.name == doctor_checks.TEXTS]
    assert report.ok and found.status == "warning"
    assert found.message == (
        "in 4 examples: a control token is spelt 2 times in texts, and encoded as text: if it should separate turns, "
        "write turns instead; 1 answer is empty: the model learns to say nothing; leave such records out"
    )
    hidden = texts(Notes(hidden=2, shortened=1), 9)
    assert hidden.status == "warning" and hidden.message.startswith("in 9 examples: 2 earlier answers are not shown")


@pytest.mark.parametrize("value", ["zero", "mean"])
def test_embeddings_that_were_never_trained(model, tokenizer, encoded, value):
    weight = model.get_input_embeddings().weight
    token = tokenizer.convert_tokens_to_ids("<|im_start|>")
    weight.data[token] = 0 if value == "zero" else weight.data.mean(0)
    found = new_tokens(model, tokenizer, encoded)
    assert found.status == "warning" and "'<|im_start|>', have an embedding that was never trained" in found.message
    weight.requires_grad_(True)
    assert new_tokens(model, tokenizer, encoded).status == "ok"


@pytest.mark.long
def test_a_pad_token_without_an_embedding_stops_no_step(model, tokenizer):
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    report = diagnose(model, tokenizer, DATA, progress=False)
    (found,) = [f for f in report.findings if f.name == doctor_checks.NEW]
    assert found.status == "warning" and found.message.startswith("'[PAD]' has id 280, but the embedding has 280 rows")
    assert report.ok and report.skipped == ()


@pytest.mark.long
def test_of_tokens_no_text_is_seen(model, tokenizer, encoded):
    """They may be of another library's making, which takes no notes."""
    unchecked = "not checked: the data came as tokens"
    for notes, message in ((Notes(), unchecked), (Notes(empty=1), "in 12 examples: 12 ans")):
        data = [replace(one, notes=notes) for one in encoded]
        findings = {found.name: found for found in diagnose(model, tokenizer, data, progress=False).findings}
        assert findings[doctor_checks.ASKED].message == unchecked
        assert findings[doctor_checks.TEXTS].message.startswith(message)


@pytest.mark.long
def test_a_tokenizer_without_pad_and_end_token(model, tokenizer):
    """Its template ends answers by a token all the same."""
    tokenizer.pad_token = tokenizer.eos_token = None
    assert diagnose(model, tokenizer, DATA, progress=False).ok


@pytest.mark.parametrize("token", [-1, 280])
def test_labels_that_no_embedding_has(model, tokenizer, encoded, token):
    faulty = [with_labels(one, lambda label: label if label == IGNORED else token) for one in encoded]
    report = diagnose(model, tokenizer, faulty, progress=False)
    (found,) = [f for f in report.findings if f.name == doctor_checks.NEW]
    assert found.status == "problem" and f"has id {token}, but" in found.message and "finite values" in report.skipped


def test_rows_and_positions(tokenizer, encoded):
    longest = max(len(one.input_ids) for one in encoded)
    found = row_lengths(tiny("Llama"), encoded)
    assert (found.status, found.message) == ("ok", f"at most {longest} tokens; the model was made for 64")
    assert row_lengths(tiny("Bloom"), encoded).message.endswith("the model was made for any length")
    assert row_lengths(tiny("Llama", max_position_embeddings=20), encoded).status == "warning"
    model = add_lora(tiny("OPT", vocab_size=280, max_position_embeddings=20), r=2)
    report = diagnose(model, tokenizer, encoded, progress=False)
    (found,) = [f for f in report.findings if f.name == doctor_checks.POSITIONS]
    reason = f"an example has {longest} tokens, but OPTForCausalLM stores 20 positions: set a lower max_length"
    assert (found.status, found.message) == ("problem", reason) and report.skipped[0] == "finite values"


@pytest.mark.long
@pytest.mark.parametrize("packing, status", [(False, "ok"), (True, "problem")])
def test_packed_rows(tokenizer, packing, status):
    """Where packing is not asked for, it is still told whether it may be."""
    sound, leaking = (add_lora(tiny(family, vocab_size=280), r=2) for family in ("Qwen2", "OPT"))
    words = {sound: "examples in one row stay apart: packing may be used"}
    words[leaking] = "leave packing off: an example reads its neighbour in the row"
    for model, message in words.items():
        report = diagnose(model, tokenizer, DATA, Settings(packing=packing), progress=False)
        (found,) = [f for f in report.findings if f.name == doctor_checks.PACKED]
        assert (found.status, found.message) == ("ok" if model is sound else status, message)
        assert report.ok == (found.status == "ok")


# ------------------------------------------------------------------------------------------------------------ steps


def test_an_infinity_in_a_layer(model, tokenizer, batch):
    assert finite_values(model, batch).status == "ok"
    model.get_submodule(BROKEN).lora_B.data[0] = torch.inf
    found = finite_values(model, batch)
    assert found.status == "problem" and found.message.startswith(f"the parameter {BROKEN}.lora_B, float32, has 4 of")
    report = diagnose(model, tokenizer, DATA, progress=False)
    assert not report.ok and "adapters learn" in report.skipped and "problem  finite values: the para" in str(report)


def test_live_adapters(model, batch):
    found = live_adapters(model, batch)
    assert found.status == "ok" and found.message.startswith("one step moves all 14, and none of ")


@pytest.mark.parametrize("again", [False, True], ids=["", "checkpointed"])
def test_an_adapter_that_is_detached(model, batch, again):
    model.get_submodule(BROKEN).register_forward_hook(lambda layer, inputs, output: layer.base(*inputs))
    with checkpointing(model) if again else mode(model, training=False):
        found = live_adapters(model, batch)
    assert found.status == "problem" and found.message.startswith("1 of 14 do not move in a step")
    assert found.message.endswith(BROKEN)


def test_reentrant_checkpoints_over_a_frozen_embedding(model, batch):
    """What users met: layers are computed without gradients, and training goes on with nothing learned."""
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = lambda run, *args: torch.utils.checkpoint.checkpoint(
            run, *args, use_reentrant=True
        )
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        found = live_adapters(model, batch)
    assert found.status == "problem" and found.message.startswith("14 of 14 do not move in a step")


def test_a_base_that_is_changed(model, batch):
    norm = model.model.norm
    hook = norm.register_forward_hook(lambda *_: norm.weight.data.mul_(1.01).any().item() and None)
    found = live_adapters(model, batch)
    hook.remove()
    assert found.status == "problem" and "a step changed model.norm.weight of the base" in found.message
    packed = model.get_submodule(BROKEN).base.weight.packed
    norm.register_forward_hook(lambda *_: packed[0].bitwise_xor_(1) and None)
    assert f"a step changed {BROKEN}.base.weight.packed of the base" in live_adapters(model, batch).message


def averages(model, batches):
    """The mean of each batch's mean, which is not the mean over all tokens."""
    for one in batches:
        summed, count = answer_loss(model, one)
        (summed / count / len(batches)).backward()


@pytest.mark.long
def test_accumulation_that_averages_averages(model, encoded, tokenizer):
    pad = pad_token_id(tokenizer)
    sound, faulty = accumulation(model, encoded[:8], pad), accumulation(model, encoded[:8], pad, averages)
    assert sound.status == "ok" and sound.message.startswith("8 at once and 8 times 1 differ by ")
    assert faulty.status == "problem" and faulty.message.endswith(
        "divide by the answer tokens of the whole batch, once"
    )


def test_accumulation_that_rounding_does_not_explain(model, encoded, tokenizer):
    """Gradients of single examples are 1.5 times too large for it; rounding itself takes less than half of that."""
    few = encoded[:4]
    allowed = 4 * tolerance(model, sum(len(example.input_ids) for example in few))

    def inexact(model, batches):
        accumulate(model, batches, sum(example.answer_tokens for example in few))
        for p in model.parameters():
            if p.grad is not None and len(batches) > 1:
                p.grad *= 1 + 1.5 * allowed

    found = accumulation(model, few, pad_token_id(tokenizer), inexact)
    assert found.status == "problem" and f"rounding explains only {allowed:.1e}" in found.message


def test_accumulation_without_gradients_or_with_one_example(model, encoded, tokenizer):
    assert accumulation(model, encoded[:1], 0).status == "warning"
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = accumulation(model, encoded[:2], 0)
    assert (found.status, found.message) == ("problem", "there is no gradient at all")


def test_tolerance_follows_the_dtype(tiny_llama):
    """n modules round: 14 linear layers, 5 norms, 2 activations, the rotation, embedding and head."""
    single = tolerance(tiny_llama)
    assert single == pytest.approx((4 * 24 / 3 * 16) ** 0.5 * 2**-24)
    assert tolerance(tiny_llama.bfloat16()) == pytest.approx((4 * 24 / 3) ** 0.5 * 2**-8)
    assert tolerance(add_lora(tiny_llama, r=2, dropout=0.1)) == pytest.approx((4 * 24 / 3) ** 0.5 * 2**-8)


def test_checkpointing_comes_and_goes(model, batch):
    """Layers run twice inside, once after; a model's own way of checkpointing is its own again."""
    calls = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))

    def step():
        calls.clear()
        with mode(model, training=True):
            answer_loss(model, batch)[0].backward()
        return len(calls)

    with checkpointing(model):
        assert step() == 2
    assert step() == 1
    model.activation_checkpointing_enable()
    with checkpointing(model):
        pass
    assert step() == 2
    with (
        pytest.raises(ValueError, match="Linear has no layer that transformers can checkpoint"),
        checkpointing(model.lm_head),
    ):
        pass


# ---------------------------------------------------------------------------------------------------------- weights


def test_trained_share(model):
    policy = dtype_policy(model)
    found = trained_share(policy)
    assert (
        found.status == "ok"
        and f"{policy.trained:,} of {policy.weights:,} weights, {policy.share:.2%}" in found.message
    )
    assert f"would say {policy.trained / policy.stored:.2%}" in found.message
    model.model.norm.weight.requires_grad_(True)
    found = trained_share(dtype_policy(model))
    assert found.status == "warning" and "16 of them are outside the adapters" in found.message


@pytest.mark.parametrize(
    "free, status, words",
    [
        (None, "ok", "this system does not say how much is free"),
        (900 * 2**20, "ok", "900 MiB are free"),
        (520 * 2**20, "warning", "520 MiB are free, which is tight"),
        (300 * 2**20, "problem", "switch gradient checkpointing on"),
        (90 * 2**20, "problem", "use fewer or shorter examples at once, or 8-bit moments"),
    ],
)
def test_memory(model, free, status, words):
    found = memory(dtype_policy(model), 500 * 2**20, 100 * 2**20, free, 2048)
    assert (
        found.status == status and words in found.message and "500 MiB of activations for 2,048 tokens" in found.message
    )


def test_activations_are_what_a_forward_pass_keeps(model, batch):
    """One tensor of known size more is that much more; checkpointing keeps less; twice the tokens, twice."""
    n = batch["input_ids"].numel()
    full, less = activations(model, batch, n)
    assert 0 < less < full and activations(model, batch, 2 * n) == (2 * full, 2 * less)
    model.model.layers[0].mlp.register_forward_hook(lambda _, inputs, output: output.exp().log())
    more, _ = activations(model, batch, n)
    assert more - full == n * 16 * 4  # exp keeps its result and log its input: that is one tensor


# ------------------------------------------------------------------------------------------------------- bad input


def test_a_model_without_adapter_is_refused(tiny_llama, tokenizer):
    with pytest.raises(ValueError, match="no adapter: call qlora_lab.add_adapter"):
        diagnose(tiny_llama, tokenizer, DATA)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"data": []}, "there are no examples: give at least one"),
        ({"settings": Settings(max_length=3)}, "no example has at most 3 tokens"),
        ({"data": "no/such/file.jsonl"}, "no/such/file.jsonl"),
    ],
)
def test_errors_teach(model, tokenizer, kwargs, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        diagnose(model, tokenizer, **{"data": DATA, "progress": False, **kwargs})


def test_encoded_examples_that_are_too_long(model, tokenizer, encoded):
    with pytest.raises(ValueError, match="no example has at most 3 tokens"):
        diagnose(model, tokenizer, encoded, Settings(max_length=3))
