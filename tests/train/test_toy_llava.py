"""A tower is trained, becomes the eye of a LLaVA folder, and is asked about pictures. Nothing here has learned."""

import numpy as np
import pytest
import torch
from PIL import Image

import qlora_lab as ql
from qlora_lab.data.shapes import WORDS, Scene, draw, shapes_split, write_shapes
from qlora_lab.train import toy_llava as toy
from qlora_lab.train.seeing import see
from qlora_lab.train.toy_llava import EMPTY, pixels, rounded, toy_llava, trained_tower

SCENES = shapes_split(8, 4).train


@pytest.fixture(scope="module")
def tower():
    return trained_tower(SCENES, 2, progress=False)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(toy, "PROJECTOR_STEPS", 2)


@pytest.fixture
def llava(folder, tower, tmp_path):
    return toy_llava(tmp_path / "llava", tower, SCENES, language=folder, progress=False)


def loaded(folder, codebook=None):
    return ql.load(folder, codebook, dtype=torch.float32, device="cpu", progress=False)


@pytest.mark.long
def test_a_seed_decides_the_tower_and_no_draw_of_the_caller_is_used(tower):
    torch.manual_seed(5)
    again = trained_tower(SCENES, 2, progress=False).state_dict()
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert all(torch.equal(again[name], tensor) for name, tensor in tower.state_dict().items())
    other = trained_tower(SCENES, 2, seed=1, progress=False).state_dict()
    assert not torch.equal(other["heads.side.weight"], again["heads.side.weight"])


def test_a_tower_says_what_it_reads(tower):
    kinds, shares = tower.read(SCENES)
    assert kinds.shape == (8, 9) and kinds.min() >= 0 and kinds.max() <= EMPTY
    for name, words in WORDS.items():
        assert shares[name].shape == (8, len(words))
        # each share is one of a sum of softmaxes, rounded 9 times
        assert torch.allclose(shares[name].sum(1), torch.ones(8), atol=1e-5)


def test_rounding_leaves_the_tower_alone_and_keeps_four_levels_a_block(tower):
    layer = "vision.encoder.layers.0.mlp.fc1"
    before = tower.get_submodule(layer).weight.clone()
    weight = rounded(tower, "nf2").get_submodule(layer).weight
    assert torch.equal(tower.get_submodule(layer).weight, before)
    assert torch.equal(weight, ql.dequantize(ql.quantize(before, "nf2", double_quant=True)))
    assert max(len(block.unique()) for block in weight.view(-1, 64)) == 4


@pytest.mark.long
def test_the_folder_reads_pictures_as_the_tower_did(llava, tower):
    model, tokenizer = loaded(llava)
    shown = tokenizer.processor.image_processor([Image.fromarray(draw(SCENES[0]))], return_tensors="pt")
    assert torch.equal(shown.pixel_values, pixels(SCENES[:1]))
    seen = model.model.vision_tower(shown.pixel_values).last_hidden_state
    # the folder holds bf16: 8 bits of the weights' fractions
    assert torch.allclose(seen, tower.vision(shown.pixel_values).last_hidden_state, atol=0.1)


@pytest.mark.long
@pytest.mark.parametrize("asked", ["colour", "side"])  # words with first letters of their own
def test_answers_are_those_of_the_whole_model(llava, asked):
    model, tokenizer = loaded(llava)
    seen = see(model, tokenizer, SCENES[:3], asked, progress=False)
    words = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in WORDS[asked]]
    for scene, shares, right in zip(SCENES[:3], seen.probabilities, seen.right, strict=True):
        picture = Image.fromarray(draw(scene))
        text = f"<|im_start|><image>\n{'Which colour?' if asked == 'colour' else 'Which side?'}\n"
        inputs = tokenizer.processor(text=[text], images=[picture], return_tensors="pt")
        assert (inputs.input_ids == model.config.image_token_id).sum() == 9
        logits = model(**inputs).logits[0, -1]
        # another batch, another order of sums
        assert torch.allclose(shares, logits.softmax(-1)[words], atol=1e-5)
        assert right == (logits.argmax() == words[WORDS[asked].index(getattr(scene, asked))])


@pytest.mark.long
def test_blank_pictures_all_give_one_answer(llava):
    model, tokenizer = loaded(llava, "nf4")
    blind = see(model, tokenizer, SCENES, "colour", blank=True, progress=False).probabilities
    assert torch.allclose(blind, blind[:1].expand_as(blind), atol=1e-6)
    assert not torch.allclose(blind, see(model, tokenizer, SCENES, "colour", progress=False).probabilities, atol=1e-6)


@pytest.mark.long
def test_it_learns_from_the_records(llava, tmp_path):
    model, tokenizer = loaded(llava, "nf4")
    ql.add_adapter(model, "full", parts="multi_modal_projector")
    data = write_shapes(tmp_path / "set", SCENES)
    options = {"batch_size": 4, "lr": 1e-2, "progress": False, "save_every": 0}
    run = ql.finetune(model, tokenizer, data, 6, tmp_path / "run", **options)
    assert np.mean(run.losses[-2:]) < np.mean(run.losses[:2])


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: trained_tower([], progress=False), ValueError, "there are no scenes: give those"),
        (lambda: trained_tower(SCENES, 0, progress=False), ValueError, "steps=0 is not allowed"),
        (lambda: toy_llava("new", None, []), ValueError, "there are no scenes: give those that the tower learned from"),
    ],
)
def test_what_cannot_be_trained_is_refused(call, error, said):
    with pytest.raises(error, match=said):
        call()


def test_a_projector_says_a_caption(folder, tower, tmp_path, monkeypatch):
    def error(steps):
        monkeypatch.setattr(toy, "PROJECTOR_STEPS", steps)
        model, tokenizer = loaded(toy_llava(tmp_path / str(steps), tower, SCENES, language=folder, progress=False))
        embeddings = model.get_input_embeddings().weight
        captions = [[scene[patch % 4] for patch in range(9)] for scene in SCENES]  # colour, shape, number, side, ...
        first = [[tokenizer(word, add_special_tokens=False).input_ids[0] for word in words] for words in captions]
        words = embeddings[torch.tensor(first)]  # (scenes, 9, width)
        patches = model.model.vision_tower(pixels(SCENES)).last_hidden_state[:, 1:]
        made = model.model.multi_modal_projector(patches)
        return ((made - words).square().mean() / words.var()).item()

    assert error(200) < 0.5 * error(1)


def test_a_folder_that_exists_is_left_alone(tower, tmp_path):
    with pytest.raises(FileExistsError, match=r"exists: name a folder that does not"):
        toy_llava(tmp_path, tower, SCENES)


@pytest.mark.long
def test_what_cannot_be_asked_is_refused(llava):
    model, tokenizer = loaded(llava)
    with pytest.raises(ValueError, match="asked='size' is not known: choose from colour, shape, number, side"):
        see(model, tokenizer, SCENES, "size", progress=False)
    with pytest.raises(ValueError, match="there are no scenes: give at least one"):
        see(model, tokenizer, [], "colour", progress=False)
    with pytest.raises(ValueError, match="two of circle, square, .* begin with the same token"):
        see(model, tokenizer, [Scene("red", "ring", "one", "top")], "shape", progress=False)
