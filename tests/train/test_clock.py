"""A template may write today's date. A run keeps the one that it began with, also when it is resumed on another day."""

import json
from datetime import datetime

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils import chat_template_utils

import qlora_lab as ql
from qlora_lab.data import dataset as data
from qlora_lab.data.examples import Example
from qlora_lab.train import run_record
from qlora_lab.train.run_record import run_clock
from qlora_lab.train.settings import Settings
from qlora_lab.train.trainer import Training

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = [Example((("user", f"{i} and {i}"), ("assistant", "two" * (i % 3 + 1)))) for i in range(9)]
DATED = "{{ '<|im_start|>system\\n' + strftime_now('%d %b %Y, %H:%M') + '<|im_end|>\\n' }}"
BEFORE, AFTER = datetime(2026, 12, 31, 23, 59), datetime(2027, 1, 1, 0, 1)


@pytest.fixture
def set_clock(monkeypatch):
    """What time it is from now on, for transformers and for this library."""

    def set_to(moment):
        class Fake(datetime):
            @classmethod
            def now(cls, tz=None):
                return moment

        for module in (chat_template_utils, data, run_record):
            monkeypatch.setattr(module, "datetime", Fake)

    return set_to


@pytest.fixture
def dated(folder, tokenizer):
    tokenizer.chat_template = DATED + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    return folder


def training(folder, out, resume=False):
    model, tokenizer = ql.load(folder, dtype=torch.float32, progress=False)
    ql.add_lora(model, r=4)
    settings = Settings(steps=4, batch_size=3, eval_every=2, save_every=1, max_length=120)
    return Training(model, tokenizer, EXAMPLES, out, settings, held_out=EXAMPLES[:2], resume=resume, progress=False)


def adapter_bytes(out):
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_that_midnight_interrupts_is_the_undisturbed_one(dated, tmp_path, set_clock):
    set_clock(BEFORE)
    training(dated, tmp_path / "whole").run()
    for line in (first := training(dated, tmp_path / "parts")):
        if line["step"] == 2:
            first.stop()
    set_clock(AFTER)
    training(dated, tmp_path / "parts", resume=True).run()
    assert adapter_bytes(tmp_path / "parts") == adapter_bytes(tmp_path / "whole")
    assert json.loads((tmp_path / "parts" / "settings.json").read_text())["clock"] == "2026-12-31T23:59:00"
    training(dated, tmp_path / "later").run()
    differing = load_file(tmp_path / "later" / "adapter" / "adapter_model.safetensors")
    same = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")
    assert not all(torch.equal(differing[key], same[key]) for key in same), "the date does reach the model"


@pytest.mark.long
def test_a_template_without_a_date_keeps_no_clock(folder, tmp_path):
    training(folder, tmp_path / "run").run()
    record = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert "clock" not in record and record["notes"] == {"empty": 0, "hidden": 0, "shortened": 0, "control_texts": 0}


def test_a_run_whose_template_had_no_date_kept_no_clock(tmp_path, tokenizer, set_clock):
    set_clock(AFTER)
    tokenizer.chat_template = DATED
    (tmp_path / "settings.json").write_text("{}")
    assert run_clock(tmp_path, tokenizer, resume=True) is None, "its tokens are compared, as they were then"
    assert run_clock(tmp_path, tokenizer, resume=False) == AFTER
    (tmp_path / "settings.json").write_text('{"clock": "2026-12-31T23:59:00"}')
    assert run_clock(tmp_path, tokenizer, resume=3) == BEFORE
    assert run_clock(tmp_path / "new", tokenizer, resume=True) == AFTER


@pytest.mark.parametrize("text", ['{"clock": "2026-', "[]", '{"clock": "yesterday"}', '{"clock": 5}', ""])
def test_a_record_that_was_damaged_is_named(tmp_path, tokenizer, text):
    tokenizer.chat_template = DATED
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ValueError, match="settings.json is damaged .*: restore the file, or start a new run"):
        run_clock(tmp_path, tokenizer, resume=True)
