"""The memory of an answer: its cache is predicted to the byte, and little comes on top of model and cache."""

import json
import os
import subprocess
import sys

import pytest

from qlora_lab.infer.cache import make_cache
from qlora_lab.infer.stack import read_stack
from qlora_lab.memory.answers import predict_cache
from qlora_lab.memory.shape import Shape
from tests.infer.conftest import small

SHAPES = {
    "two heads share a key": {},
    "each head has its own": {"num_key_value_heads": 2},
    "heads wider than the hidden state's part": {"head_dim": 96},
    "one layer": {"num_hidden_layers": 1},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rows, capacity", [(1, 1), (3, 17)])
def test_a_cache_is_predicted_to_the_byte(changes, rows, capacity):
    model = small(**changes)
    assert predict_cache(model, rows, capacity) == make_cache(read_stack(model), rows, capacity).nbytes


def mixture() -> Shape:
    return Shape("mixture", "mixtral", 2, 128, 192, 2, 1, 64, 280, False, experts=4, experts_per_token=2)


@pytest.mark.parametrize(
    "given, message",
    [
        ((small, 0, 5), "rows=0 is not allowed"),
        ((small, 1, 0), "capacity=0 is not allowed"),
        ((mixture, 1, 5), "mixture is of the family mixtral, whose cache transformers makes: choose llama, mistral"),
    ],
)
def test_what_has_no_such_cache_is_refused(given, message):
    make, *sizes = given
    with pytest.raises(ValueError, match=message):
        predict_cache(make(), *sizes)


# A small model first, in the same process: what is compiled and imported once is not memory of an answer, but what the
# real model's sizes need on top (panels, tables of addresses, logits) is.
CHILD = """
import ctypes, gc, json, sys
import torch
import qlora_lab as ql
from qlora_lab.memory.answers import predict_cache
from qlora_lab.model.linear4bit import quantize_linears
from qlora_lab.train.resident import peak_resident, reset_peak, resident
from tests.infer.conftest import small

rows, prompt, new = map(int, sys.argv[1:])
model, tokenizer = ql.load("smollm2-135m", progress=False)
model.generation_config.eos_token_id = None
sampling = ql.Sampling(temperature=0.8, top_p=0.9)
tokens = [range(1000 + row, 1000 + row + prompt - 10 * row) for row in range(rows)]
ql.decode(quantize_linears(small()), tokenizer, [[5, 6], [7]][:rows], 3, progress=False)
touched = sum(float(t.float().sum()) for t in model.parameters())  # a mapped file counts once it is read
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
assert reset_peak()
before = resident()
answers = ql.decode(model, tokenizer, [list(ids) for ids in tokens], new, sampling, progress=False)
assert all(len(answer.ids) == new for answer in answers)
cache = predict_cache(model, rows, prompt + new - 1)
print(json.dumps({"rise": peak_resident() - before, "cache": cache}))
"""
MOST = 32 * 2**20


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a process's peak is read from /proc")
@pytest.mark.parametrize("rows, prompt, new", [(1, 1024, 8), (1, 16, 8), (8, 256, 4)])
def test_an_answer_takes_its_cache_and_little_more(rows, prompt, new, record_property):
    """glibc is told to give large blocks back: by default it holds more, and not the same amount twice (LOG.md)."""
    command = [sys.executable, "-c", CHILD, str(rows), str(prompt), str(new)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = json.loads(subprocess.check_output(command, env=environment | {"OMP_NUM_THREADS": "1"}, text=True))
    record_property("above the cache", found["rise"] - found["cache"])
    # a prompt that is shorter than its cache leaves pages that nothing has written to
    assert 0 < found["rise"] - found["cache"] <= MOST, found
