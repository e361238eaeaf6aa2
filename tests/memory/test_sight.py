"""Ledgers of a model that sees: every measured row of a tiny LLaVA to the byte, with pictures in its rows."""

import json

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

import qlora_lab as ql
from qlora_lab.cli import main
from qlora_lab.memory.measured import measure_memory
from qlora_lab.memory.setup import Setup
from qlora_lab.memory.shape import shape_of
from qlora_lab.memory.sight import HEAD, LANGUAGE, PROJECTOR, TOWER
from qlora_lab.memory.weights import predicted_weights
from tests.memory.test_predict import UNSEEN, differences, measured

NARROW, WIDE = torch.bfloat16, torch.float32
ALL_THREE = (PROJECTOR, LANGUAGE, HEAD)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # models are so small that threads only wait for each other
    yield
    torch.set_num_threads(before)


def loaded(folder, dtype=WIDE, **options):
    return ql.load(folder, **{"dtype": dtype, "device": "cpu", "progress": False, "block_size": 16} | options)


def batch_of(tokenizer, dtype=WIDE, pictures=3):
    """3 rows with a picture each, of which 4 tokens are labels, but for a padded one."""
    red = Image.new("RGB", (40, 20), (255, 0, 0))
    text = "the <image> sum of" if pictures else "the sum of all the numbers"
    batch = dict(tokenizer.processor(images=[red] * pictures or None, text=[text] * 3, return_tensors="pt"))
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :-4] = -100
    batch["attention_mask"][0, -1] = 0
    return batch | ({"pixel_values": batch["pixel_values"].to(dtype)} if pictures else {})


CASES = [
    ({}, "lora", {"r": 18}, NARROW),  # r is no width of this model
    ({"also": TOWER}, "full", {"parts": PROJECTOR}, NARROW),
    ({"codebook": None}, "full", {"parts": ALL_THREE}, WIDE),
]
REST = [
    ({"codebook": None}, "lora", {"r": 18}, WIDE),
    ({"also": (TOWER, PROJECTOR)}, "dora", {"r": 18}, NARROW),
    ({"double_quant": False, "also": PROJECTOR}, "lora", {"r": 18, "targets": "attention"}, WIDE),
    ({}, "full", {"parts": PROJECTOR}, WIDE),
    ({"codebook": None}, "full", {"parts": PROJECTOR}, NARROW),
    ({"codebook": None}, "full", {"parts": LANGUAGE}, NARROW),
    ({"codebook": None}, "full", {"parts": (LANGUAGE, PROJECTOR)}, WIDE),
    ({"also": TOWER}, "prefix", {}, NARROW),
]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in REST]


@pytest.mark.parametrize("load, method, options, dtype", [*CASES, *SLOW])
def test_every_row_is_right_to_the_byte(llava_folder, load, method, options, dtype):
    model, tokenizer = loaded(llava_folder, dtype, **load)
    ql.add_adapter(model, method, **options)
    assert not differences(measured(model, batch_of(tokenizer, dtype)))


@pytest.mark.slow  # a case more
@pytest.mark.parametrize("recompute, pictures", [(True, 3), (False, 0)])
def test_so_it_is_with_layers_computed_again_and_for_texts(llava_folder, recompute, pictures):
    model, tokenizer = loaded(llava_folder)
    ql.add_lora(model, r=18) if not pictures else ql.add_adapter(model, "full", parts=PROJECTOR)
    ledger = measured(model, batch_of(tokenizer, pictures=pictures), recompute=recompute)
    assert not differences(ledger, UNSEEN | ({"rotary cosines and sines"} if recompute else set()))


def test_a_frozen_tower_keeps_nothing_and_a_projector_its_inputs(llava_folder):
    """3 pictures of 4 tokens, tower and embeddings 16 wide: three times 3 x 4 x 16 numbers, and a boolean a token."""
    setup = {"batch_size": 3, "length": 10, "dtype": "float32", "padded": True, "parts": PROJECTOR, "method": "full"}
    kept = [ql.predict_memory(llava_folder, pictures=n, **setup).group("activations") for n in (0, 1, 2)]
    assert kept[1] - kept[0] == 3 * (3 * 4 * 16) * 4 + 3 * 10
    assert kept[2] - kept[1] == 3 * (3 * 4 * 16) * 4
    lora = {name: value for name, value in setup.items() if name not in ("parts", "method")}
    frozen = [ql.predict_memory(llava_folder, pictures=n, **lora) for n in (0, 1)]
    assert frozen[0].rows == frozen[1].rows


@pytest.mark.parametrize("also", [(), TOWER, (TOWER, PROJECTOR)])
def test_weights_are_those_of_the_other_ledger(llava_folder, also):
    ledger = ql.predict_memory(llava_folder, also=also, block_size=16)
    tables = ("tables", "rotary frequencies", "places in a picture")  # not in a file
    beside = sum(ledger.row(what).predicted for what in tables)
    assert ledger.group("weights") - beside == predicted_weights(llava_folder, block_size=16, also=also).stored


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
CONFIGS = {
    "as it comes": {},
    "two layers read": {"vision_feature_layer": [-2, -1]},
    "uncropped, no biases": {"vision_feature_select_strategy": "full", "multimodal_projector_bias": False},
    "another language model": {"text_config": Qwen2Config(**SMALL, vocab_size=99, tie_word_embeddings=True)},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_transformers_builds_a_model_of_that_size(case):
    """A configuration leaves out what equals a default: the whole LLaVA-1.5 of 7B stands in its first case."""
    vision = {"vision_config": CLIPVisionConfig(**SMALL, image_size=28, patch_size=14)} if CONFIGS[case] else {}
    config = LlavaConfig(**vision, **CONFIGS[case])
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    shape = shape_of(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape_of(config.to_diff_dict()).sight == shape.sight == shape_of(model).sight
    if not CONFIGS[case]:
        assert shape.parameters == pytest.approx(7.06e9, rel=1e-3) and shape.sight.tokens == 576  # its model card


def test_what_has_no_rows_is_refused_by_name(llava_folder):
    def refused(message, model=llava_folder, **setup):
        with pytest.raises(ValueError, match=message):
            ql.predict_memory(model, **setup)

    siglip = json.loads((llava_folder / "config.json").read_text())
    siglip["vision_config"]["model_type"] = "siglip_vision_model"
    refused("has the vision tower 'siglip_vision_model', whose layers are unknown here: the ledger knows clip", siglip)
    refused(f"cannot be counted: say which parts learn, such as --parts {' '.join(ALL_THREE)}$", method="full")
    refused("parts names vision_tower: only training of multi_modal_projector, lang", method="full", parts=TOWER)
    refused("also names tower: choose from vision_tower, multi_modal_projector", also="tower")
    both = "multi_modal_projector is named in both parts and also, but a part cannot learn and be packed: leave it out"
    refused(both, method="full", parts=PROJECTOR, also=PROJECTOR)
    refused("also=.'vision_tower',. quantises, but this run does not: leave it out", method="lora", also=TOWER)
    refused("parts=.'lm_head',. does not go with method='qlora': choose method='full'", parts=HEAD)
    refused("pictures=-1 is not allowed", pictures=-1)
    refused("parts names no module, so nothing would learn", method="full", parts=())
    refused("lm_head without language_model, which is not counted: name both", method="full", parts=(PROJECTOR, HEAD))
    for option in ({"also": TOWER}, {"method": "full", "parts": HEAD}, {"pictures": 1}):
        name, given = list(option.items())[-1]
        said = rf"llama-7b reads no pictures: leave out {name} \(--{name} {given}\)"
        refused(said, "llama-7b", **option)
    tied = siglip | {"vision_config": {"model_type": "clip_vision_model"}}
    tied["text_config"] = tied["text_config"] | {"tie_word_embeddings": True}
    refused("parts names lm_head, but this model's head is its table of emb", tied, method="full", parts=ALL_THREE)
    refused("such as --parts multi_modal_projector language_model$", tied, method="full")
    refused("has vision_config=3: it is a configuration of its own", siglip | {"vision_config": 3})
    refused("has a llava as its language model: it is one of llama", siglip | {"text_config": {"model_type": "llava"}})


def test_rows_and_parts_that_differ_are_refused(llava_folder):
    model, tokenizer = loaded(llava_folder, also=TOWER)
    batch = batch_of(tokenizer)
    batch["pixel_values"] = batch["pixel_values"][:2]
    with pytest.raises(ValueError, match="2 pictures in 3 rows: a ledger takes as many in each row"):
        measure_memory(ql.add_lora(model), batch=batch)
    tower = model.model.vision_tower.encoder.layers[0].mlp
    tower.fc1 = torch.nn.Linear(16, 32)
    with pytest.raises(ValueError, match="25 of 26 linear layers are quantised: quantise all of them"):
        measure_memory(model)


def test_the_command_line_counts_a_model_that_sees(llava_folder, capsys):
    def figures(*words):
        assert main(["memory", str(llava_folder), "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)

    plain, packed = figures(), figures("--also", TOWER, PROJECTOR)
    assert packed["groups"]["weights"] < plain["groups"]["weights"]
    learned = [figures("--method", "full", "--parts", PROJECTOR, "--pictures", n)["groups"] for n in ("1", "2")]
    assert figures("--method", "full", "--parts", LANGUAGE, LANGUAGE) == figures(
        "--method", "full", "--parts", LANGUAGE
    )
    assert learned[0]["activations"] < learned[1]["activations"]
    assert main(["memory", str(llava_folder), "--method", "full"]) == 2
    assert "say which parts learn, such as --parts" in capsys.readouterr().err


def test_pictures_have_room_in_their_row(llava_folder, capsys):
    """A picture has 4 tokens here, and 576 in LLaVA-1.5, whose default configuration this is."""
    assert ql.predict_memory(llava_folder, pictures=2, length=8).tokens == 8 * Setup.batch_size
    with pytest.raises(
        ValueError, match=r"2 pictures take 8 tokens, but a row has 7: raise length \(--max-length\), or"
    ):
        ql.predict_memory(llava_folder, pictures=2, length=7)
    whole = LlavaConfig()
    assert "with --pictures N a row has N, which take 576 of its tokens each" in str(ql.predict_memory(whole))
    with pytest.raises(ValueError, match="1 picture takes 576 tokens, but a row has 256: "):
        ql.predict_memory(whole, pictures=1)
    assert "--pictures N" not in str(ql.predict_memory(whole, pictures=1, length=576))
    assert "--pictures N" not in str(ql.predict_memory("llama-7b"))
    found = ql.fit(whole, 24, pictures=1, length=600)
    assert found.fits and found.longest > 576  # the search for the longest row does not end at those without room
    assert ql.fit(whole, 1, pictures=1, length=600).longest == 0
    assert main(["memory", str(llava_folder), "--pictures", "3", "--max-length", "9"]) == 2
    said = capsys.readouterr().err
    assert "3 pictures take 12 tokens" in said and said.count("\n") == 1
