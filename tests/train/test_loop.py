"""The loop on one screen is the trainer: the same losses, gradient norms and adapters, bit for bit."""

import inspect
from copy import deepcopy

import pytest
import torch

from qlora_lab.adapters.lora import add_lora
from qlora_lab.adapters.peft_format import adapter_tensors
from qlora_lab.data.examples import Example
from qlora_lab.model.linear4bit import quantize_linears
from qlora_lab.train import loop
from qlora_lab.train.settings import Settings
from qlora_lab.train.trainer import Training

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = [Example((("user", f"{i} and {i}"), ("assistant", "two " * (1 + i % 3)))) for i in range(20)]
LONG = Example((("user", "1 and " * 300), ("assistant", "one")))  # left out: it has more than 256 tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"lr": 2e-2, "schedule": "cosine", "warmup_steps": 2, "seed": 3}], ids=["default", "cosine"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_gives_the_trainers_bits(tiny_llama, tokenizer, tmp_path, changes, dtype):
    settings = Settings(steps=7, **changes)  # 7 steps of 8 examples: almost three epochs
    model = add_lora(quantize_linears(tiny_llama).to(dtype), r=4, dropout=0.1)
    start = {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}
    twin = deepcopy(model)
    flags, state = [m.training for m in model.modules()], torch.get_rng_state()
    log = loop.train(model, tokenizer, [*EXAMPLES, LONG], settings)
    assert [m.training for m in model.modules()] == flags and torch.equal(torch.get_rng_state(), state)
    run = Training(twin, tokenizer, [*EXAMPLES, LONG], tmp_path / "run", settings, progress=False)
    for ours, theirs in zip(log, run, strict=True):
        assert ours == {name: theirs[name] for name in ours}
    trained = adapter_tensors(twin)
    for name, tensor in adapter_tensors(model).items():
        assert torch.equal(tensor, trained[name]) and not torch.equal(tensor, start[name]), name


def test_it_fits_on_one_screen():
    lines = inspect.getsource(loop.train).splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 88  # so that no line scrolls in the notebook
