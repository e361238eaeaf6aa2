"""Pictures in records: what a model that sees gets, and every kind of record that names them wrongly."""

import ast
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qlora_lab.data.dataset import IGNORED, collate, encode, encode_all, load_data, prompt_of
from qlora_lab.data.examples import Example, to_example
from qlora_lab.data.pictures import _read, expanded
from qlora_lab.model.empty_model import tokenizer_of

SIZES = {"red.png": (16, 16), "wide.jpg": (40, 20), "grey.gif": (7, 9)}


@pytest.fixture
def seeing(llava_folder):
    return tokenizer_of(llava_folder)


@pytest.fixture
def data(tmp_path):
    """Three pictures and a file that names them, in the forms of LLaVA, transformers and a table."""
    (tmp_path / "pictures").mkdir()
    for name, size in SIZES.items():
        Image.new("L" if name == "grey.gif" else "RGB", size, 80).save(tmp_path / "pictures" / name)
    turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "red"}]
    parts = [{"type": "image"}, {"type": "text", "text": " and "}, {"type": "image"}]
    both = [f"pictures/{name}" for name in ("wide.jpg", "grey.gif")]
    records = [
        {"image": "pictures/red.png", "conversations": turns},
        {"images": both, "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "two"}]},
        {"prompt": "no picture", "completion": "none"},
    ]
    path = tmp_path / "seen.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def opened(path):
    with Image.open(path) as image:
        return image.convert("RGB")


def test_records_name_pictures_from_the_folder_of_their_file(data):
    first, second, third = load_data(data)
    assert [path.name for path in (*first.pictures, *second.pictures)] == list(SIZES)
    assert all(path.is_file() for path in (*first.pictures, *second.pictures)) and third.pictures == ()
    assert second.messages[0] == ("user", "<image> and <image>") and first.unused == second.unused == ()


def test_tokens_and_numbers_are_those_of_the_processor(data, seeing):
    examples = load_data(data)
    encoded, report = encode_all(examples, seeing, 256, progress=False)
    assert report.kept == 3
    for example, ours in zip(examples, encoded, strict=True):
        messages = [{"role": role, "content": text} for role, text in example.messages]
        text = seeing.apply_chat_template(messages, tokenize=False).removesuffix("\n")
        images = [opened(path) for path in example.pictures] or None
        theirs = seeing.processor(images=images, text=[text], add_special_tokens=False, return_tensors="pt")
        batch = collate([ours], 0)
        assert batch["input_ids"][0, : theirs["input_ids"].shape[1]].tolist() == theirs["input_ids"][0].tolist()
        assert batch.keys() - {"labels"} == theirs.keys()
        if images:
            assert torch.equal(batch["pixel_values"], theirs["pixel_values"])
    whole = collate(encoded, 0)  # one row without a picture among them
    assert whole["pixel_values"].shape == (3, 3, 16, 16) and whole["input_ids"].shape[0] == 3


def test_only_the_answer_is_learned(data, seeing):
    encoded = encode(load_data(data)[0], seeing)
    learned = [token for token in encoded.labels if token != IGNORED]
    assert seeing.decode(learned) == "red<|im_end|>"
    assert encoded.input_ids.count(seeing.processor.image_token_id) == 4


def test_a_prompt_ends_where_the_answer_begins(data, seeing):
    example = load_data(data)[1]
    encoded = encode(example, seeing)
    ids, pictures = prompt_of(example, seeing)
    start = next(i for i, label in enumerate(encoded.labels) if label != IGNORED)
    assert ids == encoded.input_ids[:start] and pictures == encoded.pictures


@pytest.mark.parametrize("date", ["", "1 Jan 2023 ", "4 Jan 2023 "])  # a template's own words are not the content
def test_a_template_that_takes_parts_alone_gets_parts(data, seeing, date):
    """As LLaVA 1.5's, which shows nothing of a content that is a text; an end token is added here."""
    seeing.chat_template = (
        f"{date}"
        "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
        "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
        "{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
    )
    encoded = encode(load_data(data)[0], seeing)
    written = f"{date}USER: " + "<image>" * 4 + "\nWhat colour? ASSISTANT: red<|im_end|>"
    assert seeing.decode(encoded.input_ids) == written
    assert sum(label != IGNORED for label in encoded.labels) == len(seeing.encode("red<|im_end|>"))


def test_the_template_of_the_documentation_ends_an_answer_and_one_without_end_is_refused(data, seeing):
    page = (Path(__file__).parents[2] / "docs" / "pictures.md").read_text("utf-8")
    seeing.chat_template = ast.literal_eval(re.search(r"chat_template = (\(.*?\n\))", page, re.DOTALL)[1])
    encoded = encode(load_data(data)[0], seeing)
    learned = seeing.decode([token for token in encoded.labels if token != IGNORED])
    assert learned.strip() == f"red{seeing.eos_token}"
    assert prompt_of(load_data(data)[0], seeing).ids == encoded.input_ids[: -sum(x != IGNORED for x in encoded.labels)]
    seeing.chat_template = seeing.chat_template.replace("eos_token if m.role == 'assistant' else ", "")
    with pytest.raises(ValueError, match="so the model would never stop"):
        encode(load_data(data)[0], seeing)


ASKED = {"prompt": "<image> what?", "completion": "red"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (ASKED | {"images": ["a", "b"]}, "has 2 pictures, but <image> 1 time: write <image> in a question where each"),
        (ASKED | {"image": "a", "prompt": "what?"}, "has 1 picture, but <image> 0 times"),
        (ASKED | {"image": "a", "prompt": "what?", "completion": "<image>"}, "an answer holds <image>, but pictures"),
        (ASKED | {"image": "a", "images": ["b"]}, "has 'image' and 'images': keep one of them"),
        (ASKED | {"image": "a\0b"}, "'image' must be the path of an image file"),
        (ASKED | {"image": 3}, "'image' must be the path of an image file, or a list of them, found 3"),
        (ASKED | {"images": [{"bytes": "x"}]}, "'images' must be the path of an image file"),
    ],
)
def test_a_record_with_wrong_places_is_refused(record, message):
    with pytest.raises(ValueError, match=message):
        to_example(record)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"line 1: no picture at .*red.png: name it from the folder of the data file"),
        (b"", r"line 1: .*red.png is not a picture \(in none of BMP, GIF, .*\): put a whole one"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "red.png is not a picture"),  # Pillow would run it
        (b"no picture", "red.png is not a picture"),
        ("cut off", "red.png is not a picture .*truncated"),
    ],
)
def test_a_file_that_is_no_picture_is_named(data, seeing, content, message):
    path = data.parent / "pictures" / "red.png"
    Image.effect_noise((40, 40), 90).save(path)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:300] if content == "cut off" else content)
    with pytest.raises(ValueError, match=message) as error:
        encode_all(load_data(data), seeing, 256, progress=False)
    assert "\n" not in str(error.value) and "0x" not in str(error.value)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_a_grey_picture_of_16_bits_is_scaled_to_8(tmp_path, name):
    levels = np.array([[0, 128, 129, 257, 65278, 65535]], np.uint16)  # 128 / 257 is just below half
    Image.fromarray(levels).save(tmp_path / name)
    _, image = _read(tmp_path / name)
    assert np.asarray(image)[0].tolist() == [[grey] * 3 for grey in (0, 0, 1, 1, 254, 255)]


@pytest.mark.parametrize("head", ["P5", "P2"])  # in bytes, the higher one first, and in words
@pytest.mark.parametrize(("white", "seen"), [(65535, [0, 0, 1, 1, 254, 255]), (1023, [0, 32, 32, 64, 255, 255])])
def test_a_grey_portable_map_of_more_than_8_bits_is_scaled_to_8(tmp_path, head, white, seen):
    """Levels are parts of the highest, which the file names: 128 of 1023 are 32 of 255."""
    levels = np.minimum([0, 128, 129, 257, 65278, 65535], white)
    body = levels.astype(">u2").tobytes() if head == "P5" else " ".join(map(str, levels)).encode()
    (tmp_path / "deep.pgm").write_bytes(f"{head}\n6 1\n{white}\n".encode() + body)
    assert np.asarray(_read(tmp_path / "deep.pgm")[1])[0].tolist() == [[grey] * 3 for grey in seen]


def test_a_coloured_portable_map_of_16_bits_is_scaled_to_8(tmp_path):
    colours = np.array([[65535, 0, 257], [128, 32896, 65278]], ">u2")
    (tmp_path / "deep.ppm").write_bytes(b"P6\n2 1\n65535\n" + colours.tobytes())
    assert np.asarray(_read(tmp_path / "deep.ppm")[1])[0].tolist() == [[255, 0, 1], [0, 128, 254]]


@pytest.mark.parametrize(("mode", "name"), [("I", "ints.tif"), ("F", "floats.tif"), ("F", "floats.pfm")])
def test_a_picture_without_a_range_is_refused(tmp_path, mode, name):
    Image.new(mode, (4, 4), 1000).save(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} has 32 bits a channel .*mode {mode}.*: save it with 8 bits a chan"):
        _read(tmp_path / name)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("name", ["turned.png", "turned.tif"])  # Pillow turns a TIFF itself, and not twice
def test_a_picture_is_turned_as_its_exif_data_say(tmp_path, dtype, name):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees, clockwise
    levels = np.zeros((2, 6), dtype)
    levels[0, 0] = np.iinfo(dtype).max
    Image.fromarray(levels).save(tmp_path / name, exif=exif)
    seen = np.asarray(_read(tmp_path / name)[1])  # (height, width, 3)
    assert seen.shape == (6, 2, 3) and seen[0, 1].tolist() == [255] * 3 and seen.sum() == 3 * 255


@pytest.mark.parametrize("side", [9_460, 14_000])  # above Pillow's warning, and above its error
@pytest.mark.filterwarnings("error")
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, side):
    header = struct.pack(">II5B", side, side, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "bomb.png").write_bytes(data + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    with pytest.raises(ValueError, match=r"bomb.png has more than 89,478,485 pixels: make it smaller"):
        _read(tmp_path / "bomb.png")


def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(50 << 30)  # sparse: no block of it is written
    with pytest.raises(ValueError, match=r"huge.png has 53,687,091,200 bytes, but a picture has at most 268,435,456"):
        _read(tmp_path / "huge.png")


def test_a_path_that_no_system_has_is_named(seeing):
    example = to_example(ASKED | {"image": "a" * 5000})
    with pytest.raises(ValueError, match="cannot be read: File name too long|no picture at a"):
        encode(example, seeing)


def test_a_picture_that_changes_after_encoding_is_noticed(data, seeing):
    encoded = encode(load_data(data)[0], seeing)
    Image.new("RGB", (16, 16), "blue").save(data.parent / "pictures" / "red.png")
    with pytest.raises(ValueError, match="red.png has changed since it was first read"):
        collate([encoded], 0)


def test_what_does_not_belong_together_is_refused(data, seeing, tokenizer):
    example = load_data(data)[0]
    with pytest.raises(ValueError, match="line 1: there are pictures, but the tokenizer has no processor"):
        encode(example, tokenizer)
    with pytest.raises(ValueError, match="a text holds <image>, but no picture is named: name it in 'image'"):
        encode(Example((("user", "<image>"), ("assistant", "a"))), seeing)
    spelt = Example((("user", "<image> <|im_end|>"), ("assistant", "a")), pictures=example.pictures)
    with pytest.raises(ValueError, match="a text beside pictures spells a control token: leave it out"):
        encode(spelt, seeing)
    with pytest.raises(ValueError, match="a text beside pictures spells a control token"):
        prompt_of(spelt, seeing)


def test_a_text_of_a_text_model_may_hold_the_placeholder(tokenizer):
    turns = (("user", "what does <image> do?"), ("assistant", "a"))
    assert expanded(turns, (), tokenizer) == (turns, (), frozenset())
    assert "<image>" in tokenizer.decode(encode(Example(turns), tokenizer).input_ids)


def test_pictures_of_other_shapes_are_not_joined(data, seeing):
    seeing.processor.image_processor.do_resize = seeing.processor.image_processor.do_center_crop = False
    encoded, _ = encode_all(load_data(data)[:2], seeing, 256, progress=False)
    with pytest.raises(ValueError, match="red.png and .*wide.jpg become pixel_values of different shapes"):
        collate(encoded, 0)
