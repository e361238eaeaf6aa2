"""The bench of answers runs, on a model that takes no time. No test asserts a time."""

from functools import partial

from bench import decode
from qlora_lab.infer.step import step


def test_answers_are_timed_one_after_the_other(monkeypatch):
    monkeypatch.setattr(decode, "copy_seconds", lambda n_bytes: n_bytes / 1e9)
    monkeypatch.setattr(decode, "step_of", lambda stack: partial(step, stack))  # nothing is compiled
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setattr(decode, "LLAMA_7B", decode.LLAMA_7B | sizes | {"vocab_size": 2048})
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
