"""The bench of answers runs, on a model that takes no time. No test asserts a time."""

import io
import json
import sys

import pytest
import torch

from bench import decode, decode_contenders as contenders_of, decode_int8
from bench.seven_b import byte_tokenizer
from qlora_lab.infer import fast
from qlora_lab.infer.stack import read_stack
from tests.faults import allocation_faults

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}


STUB = """
import json, sys
print(json.dumps({"contenders": ["a"], "heard": json.loads(input())}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    tokens = asked["steps"] if asked["contender"] == "a" else 0
    print(json.dumps({"first": 1.0, "rest": 0.5, "tokens": tokens}), flush=True)
"""


def test_answers_are_timed_one_after_the_other(monkeypatch):
    monkeypatch.setattr(decode, "copy_seconds", lambda n_bytes: n_bytes / 1e9)
    monkeypatch.setattr(fast, "can_step", lambda stack: False)
    monkeypatch.setattr(contenders_of, "LLAMA_7B", contenders_of.LLAMA_7B | SIZES | {"vocab_size": 2048})
    model, words = contenders_of.random_7b(layers=2), byte_tokenizer()
    contenders = {
        "ours": contenders_of.ours(model, words),
        "rows": contenders_of.ours(model, words, 2, int8=True),
        "transformers": contenders_of.theirs(model),
    }
    # a clock that counts operations: a token's time is a difference, which chance can make negative on a busy machine
    with allocation_faults() as work:
        monkeypatch.setattr(contenders_of, "perf_counter", lambda: work.count)
        row = decode.measure(contenders, 1000, (4, 3), rounds=2)
    assert set(row["contenders"]) == set(contenders) and row["floor"]["median"] == 1e-6
    assert all(of["first"]["median"] > 0 and of["token"]["median"] > 0 for of in row["contenders"].values())
    prompt = decode.measure(contenders, 1000, (4, 1), rounds=2)
    assert all(set(of) == {"first"} for of in prompt["contenders"].values())
    assert contenders_of.ours(contenders_of.adapted(model), words)([1, 2], 2).keys() == {"first", "rest"}


def test_answers_of_two_lengths_separate_the_first_token():
    answer = contenders_of._in_two_lengths(lambda prompt, tokens: len(prompt) + tokens / 4)
    assert answer([1, 2], 3) == {"first": 2.25, "rest": 0.5} and answer([1, 2], 1) == {"first": 2.25, "rest": 0}


def test_a_program_is_asked_line_by_line():
    with decode.Program(sys.executable, "-c", STUB, first={"threads": 2}) as program:
        assert program.hello == {"contenders": ["a"], "heard": {"threads": 2}}
        assert program.contender("a")([1, 2], 3) == {"first": 1.0, "rest": 0.5}
        with pytest.raises(AssertionError, match="'tokens': 0"):  # it did not answer what was asked
            program.contender("b")([1, 2], 3)
    with pytest.raises(RuntimeError, match="ended with 3"):
        decode.Program(sys.executable, "-c", "raise SystemExit(3)")


def test_the_contenders_program_answers_line_by_line(monkeypatch):
    answers = {"a": lambda prompt, tokens: {"first": 1.0 * len(prompt), "rest": 0.5}}
    monkeypatch.setitem(contenders_of.PROGRAMS, "ours", lambda: (answers, 7))
    replies = io.StringIO()
    monkeypatch.setattr(contenders_of, "own_output", lambda: replies)
    monkeypatch.setattr(sys, "argv", ["decode_contenders.py", "ours"])
    monkeypatch.setattr(sys, "stdin", [json.dumps({"contender": "a", "prompt": [1, 2], "steps": 4})])
    contenders_of.main()
    lines = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert lines == [{"contenders": ["a"], "bytes": 7}, {"first": 2.0, "rest": 0.5, "tokens": 4}]


@pytest.mark.long  # compiles the product
def test_what_int8_loses_is_measured(monkeypatch, tokenizer):
    monkeypatch.setattr(contenders_of, "LLAMA_7B", contenders_of.LLAMA_7B | SIZES | {"vocab_size": 280})
    monkeypatch.setattr(fast, "can_step", lambda stack: False)
    model = contenders_of.random_7b(layers=2)
    found = decode_int8.over_text(read_stack(model), torch.arange(24).view(2, 12))
    every = found["perplexity"]
    assert list(every) == list(decode_int8.WAYS)
    for how in decode_int8.WAYS[1:]:
        assert found[how]["perplexity, relative"] == every[how] / every["float32"] - 1 != 0
        assert 0 < found[how]["divergence"] < 0.1 and 0.001 < found[how]["logits, relative"] < 0.3
    assert contenders_of.ours(model, tokenizer, 2, int8=True)([1, 2, 3], 1)["first"] > 0
    answers = decode_int8.over_answers(model, tokenizer, [[3, 4, 5, 6], "the sum"], 4)
    assert answers["prompts"] == 2 and answers["parted"] == len(answers["first different token"])
