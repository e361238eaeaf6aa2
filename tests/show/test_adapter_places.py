"""The picture of a layer: each weight of a LLaMA is in it, and each method has its place and its colour."""

from qlora_lab.memory.shape import shape_of
from qlora_lab.show import adapter_places as module
from qlora_lab.show.adapter_places import LINEARS, METHODS, adapter_places


def test_every_weight_of_a_layer_has_a_place():
    assert [f"{name}_proj" for name in LINEARS] == [linear.name for linear in shape_of("llama-7b").linears]
    assert len(set(LINEARS.values())) == 7


def test_the_picture_and_its_words(monkeypatch):
    drawn = []
    monkeypatch.setattr(module, "picture", lambda fig, alt: drawn.append((fig, alt)))
    adapter_places()
    ((fig, alt),) = drawn
    (ax,) = fig.axes
    words = [text.get_text() for text in ax.texts]
    assert ax.get_title() == "One layer, and what each method adds to it" and "one layer" in words
    assert {*LINEARS, *METHODS, "prefix", "prompt", "tokens", "embeddings", "silu", "softmax\n(q kᵀ) v"} <= set(words)
    assert words.count("norm") == words.count("+") == 2
    assert all(name in alt for name in [*LINEARS, "LoRA", "Houlsby", "prefix", "prompt", "biases"])
