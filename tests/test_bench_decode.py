"""The bench of answers runs, on a model that takes no time. No test asserts a time."""

from functools import partial

import pytest
import torch

from bench import decode, decode_int8
from qlora_lab.infer import fast
from qlora_lab.infer.stack import read_stack
from qlora_lab.infer.step import step

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}


def test_answers_are_timed_one_after_the_other(monkeypatch):
    monkeypatch.setattr(decode, "copy_seconds", lambda n_bytes: n_bytes / 1e9)
    monkeypatch.setattr(decode, "step_of", lambda stack, int8: partial(step, stack))  # nothing is compiled
    monkeypatch.setattr(decode, "LLAMA_7B", decode.LLAMA_7B | SIZES | {"vocab_size": 2048})
    model = decode.random_7b(layers=2)
    contenders = {
        "ours": decode.ours(model),
        "rows": decode.ours(model, 2, int8=True),
        "transformers": decode.theirs(model),
    }
    row = decode.measure(contenders, 1000, (4, 3), rounds=2)
    assert set(row["contenders"]) == set(contenders) and row["floor"]["median"] == 1e-6
    assert all(of["first"]["median"] > 0 and of["token"]["median"] > 0 for of in row["contenders"].values())
    prompt = decode.measure(contenders, 1000, (4, 1), rounds=2)
    assert all(set(of) == {"first"} for of in prompt["contenders"].values())
    assert decode.ours(decode.adapted(model))([1, 2], 2).keys() == {"first", "rest"}


@pytest.mark.long  # compiles the product
def test_what_int8_loses_is_measured(monkeypatch, tokenizer):
    monkeypatch.setattr(decode, "LLAMA_7B", decode.LLAMA_7B | SIZES | {"vocab_size": 280})
    monkeypatch.setattr(fast, "can_step", lambda stack: False)
    model = decode.random_7b(layers=2)
    found = decode_int8.over_text(read_stack(model), torch.arange(24).view(2, 12))
    every = found["perplexity"]
    assert list(every) == list(decode_int8.WAYS)
    for how in decode_int8.WAYS[1:]:
        assert found[how]["perplexity, relative"] == every[how] / every["float32"] - 1 != 0
        assert 0 < found[how]["divergence"] < 0.1 and 0.001 < found[how]["logits, relative"] < 0.3
    assert decode.ours(model, 2, int8=True)([1, 2, 3], 1)["first"] > 0
    answers = decode_int8.over_answers(model, tokenizer, [[3, 4, 5, 6], "the sum"], 4)
    assert answers["prompts"] == 2 and answers["parted"] == len(answers["first different token"])
