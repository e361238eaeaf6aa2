"""The memory of an answer: its cache is predicted to the byte, and little comes on top of model and cache."""

import json
import os
import subprocess
import sys

import pytest

from qlora_lab.infer.cache import make_cache
from qlora_lab.infer.fast import bytes_read
from qlora_lab.infer.stack import read_stack
from qlora_lab.memory.answers import Machine, StepWork, predict_cache, step_work
from qlora_lab.memory.shape import Shape
from qlora_lab.model.linear4bit import quantize_linears
from tests.infer.conftest import small

SHAPES = {
    "two heads share a key": {},
    "each head has its own": {"num_key_value_heads": 2},
    "heads wider than the hidden state's part": {"head_dim": 96},
    "one layer": {"num_hidden_layers": 1},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rows, capacity", [(1, 1), (3, 17)])
@pytest.mark.parametrize("bits", [32, 8])
def test_a_cache_is_predicted_to_the_byte(changes, rows, capacity, bits):
    model = small(**changes)
    assert predict_cache(model, rows, capacity, bits) == make_cache(read_stack(model), rows, capacity, bits).nbytes


def mixture() -> Shape:
    return Shape("mixture", "mixtral", 2, 128, 192, 2, 1, 64, 280, False, experts=4, experts_per_token=2)


@pytest.mark.parametrize(
    "given, message",
    [
        ((small, 0, 5), "rows=0 is not allowed"),
        ((small, 1, 0), "capacity=0 is not allowed"),
        ((small, 1, 5, 16), "bits=16 is not allowed: a cache has 32 or 8"),
        ((mixture, 1, 5), "mixture is of the family mixtral, whose cache transformers makes: choose llama, mistral"),
    ],
)
def test_what_has_no_such_cache_is_refused(given, message):
    make, *sizes = given
    with pytest.raises(ValueError, match=message):
        predict_cache(make(), *sizes)


# A small model first, in the same process and with as many texts, since each number has a kernel of its own: what is
# compiled and imported once is not memory of an answer, but what the real model's sizes need on top (panels, tables of
# addresses, logits) is.
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
ql.decode(quantize_linears(small()), tokenizer, [[5, 6]] * rows, 3, progress=False)
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


def test_the_work_of_a_step_worked_by_hand():
    """LLaMA-7B: 32 layers of 202,375,168 weights, a head of 131,072,000; 4,096 numbers of a key and of a value."""
    work = step_work("llama-7b", 10, 4)
    assert work.weight_bytes == 32 * 202_375_168 / 2 + 131_072_000 * 2
    assert work.text_bytes == 10 * 32 * 2 * 4096 * 4
    assert work.operations == 2 * (32 * 202_375_168 + 131_072_000) + 10 * 32 * 4096 * 4
    assert StepWork(100.0, 10, 1000).seconds(Machine(10, 500), 3) == (13.0, 6.0)


def test_the_weights_of_a_step_are_those_that_a_token_reads():
    model = quantize_linears(small())
    stack = read_stack(model)
    weights = [part.weight for layer in stack.layers for part in layer.products]
    packed = sum(weight.nbytes for weight in weights)
    bits = 8 * packed / sum(weight.numel for weight in weights)
    head_beyond = stack.head.weight.nbytes / 2  # this model's head is float32
    assert step_work(model, 1, bits).weight_bytes == pytest.approx(bytes_read(stack) - head_beyond)


def test_at_the_ridge_both_take_equally_long():
    work, machine = step_work("llama-7b", 64, 4.127), Machine(20e9, 200e9)
    assert work.seconds(machine, work.ridge(machine))[0] == pytest.approx(work.seconds(machine, work.ridge(machine))[1])
    assert step_work("llama-7b", 8192, 4.127).ridge(machine) is None


@pytest.mark.parametrize(
    "context, bits, message",
    [(0, 4, "context=0 is not allowed"), (1, 0, "bits=0 is not allowed"), (1, 33, "at most 32")],
)
def test_no_work_is_refused(context, bits, message):
    with pytest.raises(ValueError, match=message):
        step_work("llama-7b", context, bits)
