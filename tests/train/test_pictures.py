"""A model that sees learns from pictures: its projector, then its language model. A resume gives the same bits."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from qlora_lab.adapters.adapter import adapters, learned
from qlora_lab.adapters.add_adapter import add_adapter
from qlora_lab.adapters.lora import add_lora
from qlora_lab.adapters.peft_format import load_adapter, save_adapter
from qlora_lab.data.dataset import collate, encode_all, load_data
from qlora_lab.doctor.diagnose import diagnose
from qlora_lab.measure.held_out import generate, generate_answers, held_out
from qlora_lab.model.load import load
from qlora_lab.train import limits
from qlora_lab.train.identity import base_checksum
from qlora_lab.train.settings import Settings
from qlora_lab.train.trainer import Training, finetune

pytestmark = pytest.mark.usefixtures("one_thread")
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture
def data(tmp_path):
    """Six pictures of one colour each, and the question which; one record of text only."""
    lines = [json.dumps({"prompt": "no picture", "completion": "none"})]
    for i, (name, colour) in enumerate([*COLOURS.items()] * 2):
        Image.new("RGB", (16 + i, 20), colour).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "prompt": "<image>\nWhich colour?", "completion": name}))
    (tmp_path / "colours.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "colours.jsonl"


def quiet(folder, **options):
    return load(folder, **{"dtype": torch.float32, "device": "cpu", "progress": False, "block_size": 16} | options)


def trained(model, tokenizer, data, folder, **options):
    how = {"steps": 4, "batch_size": 4, "lr": 1e-2, "save_every": 2, "progress": False} | options
    return finetune(model, tokenizer, data, out=folder, **how)


def batch_of(data, tokenizer):
    return collate(encode_all(load_data(data)[:4], tokenizer, 256, progress=False)[0], 0)


@pytest.mark.long
@pytest.mark.parametrize("micro", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_a_resumed_run_gives_the_same_bits(llava_folder, data, tmp_path, micro):
    model, tokenizer = quiet(llava_folder)
    frozen = base_checksum(add_lora(model, r=4))
    whole = trained(model, tokenizer, data, tmp_path / "whole", micro_batch_size=micro)
    assert base_checksum(model) == frozen and whole.losses[-1] < whole.losses[0]
    assert all(layer.lora_B.any() for layer in adapters(model).values())
    stopped = Training(
        add_lora(quiet(llava_folder)[0], r=4), tokenizer, data, tmp_path / "cut", whole.settings, progress=False
    )
    for line in stopped:
        if line["step"] == 2:
            stopped.stop()
    again = add_lora(quiet(llava_folder)[0], r=4)
    resumed = trained(again, tokenizer, data, tmp_path / "cut", micro_batch_size=micro, resume=True)
    assert resumed.losses == whole.losses
    first, second = ((run.adapter / "adapter_model.safetensors").read_bytes() for run in (whole, resumed))
    assert first == second


@pytest.mark.slow
def test_another_picture_is_another_run(llava_folder, data, tmp_path):
    model, tokenizer = quiet(llava_folder)
    how = {"steps": 4, "batch_size": 4, "lr": 1e-2, "save_every": 2}
    begun = Training(add_lora(model, r=4), tokenizer, data, tmp_path / "run", Settings(**how), progress=False)
    for _ in begun:
        begun.stop()
    Image.new("RGB", (16, 20), "black").save(tmp_path / "0.png")
    with pytest.raises(ValueError, match="holds a different run, so it cannot be resumed: data.sha256"):
        trained(add_lora(quiet(llava_folder)[0], r=4), tokenizer, data, tmp_path / "run", resume=True)


@pytest.mark.slow
def test_the_projector_learns_beside_packed_layers_and_then_the_language_model(llava_folder, data, tmp_path):
    """Stage one and two of LLaVA: what learned in one is the base of the other."""
    model, tokenizer = quiet(llava_folder)
    before = base_checksum(add_adapter(model, "full", parts="multi_modal_projector"))
    run = trained(model, tokenizer, data, tmp_path / "one")
    assert {name.split(".")[1] for name in learned(model)} == {"multi_modal_projector"}
    assert base_checksum(model) == before and run.losses[-1] < run.losses[0]
    again = load_adapter(quiet(llava_folder)[0], run.adapter)
    batch = batch_of(data, tokenizer)
    batch.pop("labels")
    assert torch.equal(again(**batch).logits, model(**batch).logits)

    plain, _ = quiet(llava_folder, codebook=None)
    trained(add_adapter(plain, "full", parts="multi_modal_projector"), tokenizer, data, tmp_path / "plain")
    plain.save_pretrained(tmp_path / "staged")
    tokenizer.processor.save_pretrained(tmp_path / "staged")
    second, seeing = quiet(tmp_path / "staged")
    projector = plain.model.multi_modal_projector.linear_1.weight
    assert torch.equal(second.model.multi_modal_projector.linear_1.weight, projector)
    trained(add_lora(second, r=4), seeing, data, tmp_path / "two")


@pytest.mark.slow
def test_peft_reads_the_adapter_on_the_plain_model(llava_folder, data, tmp_path):
    from peft import PeftModel

    model, tokenizer = quiet(llava_folder, codebook=None)
    trained(add_lora(model, r=4), tokenizer, data, tmp_path / "run")
    save_adapter(model, tmp_path / "adapter")
    plain = LlavaForConditionalGeneration.from_pretrained(llava_folder).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own remarks
        theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    batch = batch_of(data, tokenizer)
    batch.pop("labels")
    torch.testing.assert_close(model(**batch).logits, theirs(**batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_it_is_evaluated_and_asked_with_pictures(llava_folder, data, tmp_path):
    model, tokenizer = quiet(llava_folder)
    examples = load_data(data)
    run = trained(add_lora(model, r=8), tokenizer, data, tmp_path / "run", steps=30, held_out=examples, eval_every=15)
    assert run.held_out[-1][1] < run.held_out[0][1]
    seen = [example for example in examples if example.pictures]
    moved = [replace(a, pictures=b.pictures) for a, b in zip(seen, [*seen[1:], seen[0]], strict=True)]
    right, wrong = (held_out(model, tokenizer, some, progress=False) for some in (seen, moved))
    assert right.loss < wrong.loss  # the answers are read from the pictures
    asked = seen[1]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked.messages[0][1]}], tokenize=False, add_generation_prompt=True
    )
    with Image.open(asked.pictures[0]) as image:
        inputs = tokenizer.processor(images=[image], text=[text], add_special_tokens=False, return_tensors="pt")
    said = model.generate(**inputs, do_sample=False, max_new_tokens=9, pad_token_id=0)
    want = tokenizer.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    answer = generate(model, tokenizer, "<image>\nWhich colour?", 9, pictures=asked.pictures, progress=False)
    assert answer == want != ""


@pytest.mark.long
def test_one_picture_is_asked_about_by_its_path(llava_folder, data):
    model, tokenizer = quiet(llava_folder)
    path = data.parent / "0.png"
    how = {"max_new_tokens": 2, "progress": False}
    want = generate(model, tokenizer, "<image>\nWhich colour?", pictures=[path], **how)
    assert generate(model, tokenizer, "<image>\nWhich colour?", pictures=str(path), **how) == want
    with pytest.raises(ValueError, match="the question has 1 picture, but <image> 0 times: write <image> in"):
        generate(model, tokenizer, "Which colour?", pictures=path, **how)
    with pytest.raises(ValueError, match="<image>, but no picture is named: name it .* in `pictures` of `generate`"):
        generate(model, tokenizer, "<image>\nWhich colour?", **how)


@pytest.mark.long
def test_a_processor_of_another_tower_is_told(llava_folder, data, tmp_path):
    model, tokenizer = quiet(llava_folder)
    tokenizer.processor.image_processor.crop_size = {"height": 24, "width": 24}
    with pytest.raises(ValueError, match=r"cannot read .*\.png \(.*24.*\): use the processor of this model") as error:
        trained(add_lora(model), tokenizer, data, tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_tower_is_asked_before_an_answer_or_a_loss(llava_folder, data, monkeypatch):
    model, tokenizer = quiet(llava_folder)
    tokenizer.processor.image_processor.crop_size = {"height": 24, "width": 24}
    monkeypatch.setattr(model, "generate", None)  # nobody comes so far
    message = r"LlavaFor.* cannot read .*\.png \(.*24.*\): use the processor of this model"
    seen = [example for example in load_data(data) if example.pictures]
    with pytest.raises(ValueError, match=message) as error:
        generate(model, tokenizer, "<image>\nWhich colour?", 2, pictures=data.parent / "0.png", progress=False)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        held_out(model, tokenizer, seen, progress=False)
    with pytest.raises(ValueError, match=message):
        generate_answers(model, tokenizer, seen, progress=False)


def test_memory_that_runs_out_is_not_the_fault_of_a_picture(llava_folder, data, monkeypatch):
    model, tokenizer = quiet(llava_folder)

    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(limits, "answer_loss", full)
    with pytest.raises(RuntimeError, match="^DefaultCPUAllocator"):
        generate(model, tokenizer, "<image>\nWhich colour?", 2, pictures=data.parent / "0.png", progress=False)


@pytest.mark.long
def test_a_later_picture_of_another_size_is_told_before_the_first_step(llava_folder, tmp_path):
    """A processor that resizes nothing: the first three pictures fit the tower."""
    model, tokenizer = quiet(llava_folder)
    images = tokenizer.processor.image_processor
    images.do_resize = images.do_center_crop = False
    records = []
    for i, size in enumerate([16, 16, 16, 24]):
        Image.new("RGB", (size, size), "red").save(tmp_path / f"{i}.png")
        records.append({"image": str(tmp_path / f"{i}.png"), "prompt": "<image>\nWhich?", "completion": "red"})
    with pytest.raises(ValueError, match=r"LlavaFor.* cannot read .*3\.png \(.*24.*\): use the processor") as error:
        trained(add_lora(model), tokenizer, records, tmp_path / "run", batch_size=1, steps=4)
    assert "\n" not in str(error.value) and not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.long
def test_pictures_are_not_packed(llava_folder, data, tmp_path):
    model, tokenizer = quiet(llava_folder)
    with pytest.raises(ValueError, match="examples with pictures cannot be packed: leave out packing"):
        trained(add_lora(model), tokenizer, data, tmp_path / "run", packing=True)


@pytest.mark.slow
def test_the_doctor_finds_nothing(llava_folder, data):
    model, tokenizer = quiet(llava_folder)
    report = diagnose(add_lora(model), tokenizer, load_data(data), Settings(batch_size=2), progress=False)
    assert report.ok, str(report)
    assert "7 assistant; 6 pictures" in str(report)
