"""llama.cpp itself reads our GGUF files as transformers reads the folders: the same tokens, the same greedy answers.

It needs node and the package node-llama-cpp, which has llama.cpp compiled: npm install --prefix build node-llama-cpp.
Models are tiny and random, so that all families and rules are run; bench/llama_cpp.py asks SmolLM2.
"""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from bench.llama_cpp import llama_cpp, with_weights_of
from qlora_lab.export.gguf_out import to_gguf
from tests.export.test_gguf_out import KNOWN, changed, saved

PACKAGES = Path(__file__).parents[2] / "build"
HAS_PACKAGE = (PACKAGES / "node_modules" / "node-llama-cpp").exists()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("node") is None, reason="needs node"),
    pytest.mark.skipif(not HAS_PACKAGE, reason="needs a package: npm install --prefix build node-llama-cpp"),
]
TEXTS = [
    "the sum of 12 two  numbers 2019, l'\u00e9t\u00e9\n\n",
    "It's 1234567890 o'clock; THEY'LL say\tthat's\r\n  fine...  \n x",
    "<|im_start|>user\n\u4f60\u597d \u00bd \u2167 \U0001f600<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.mark.parametrize("rule", ["smollm", *KNOWN])
def test_it_splits_texts_by_the_rule_that_is_named(tmp_path, tokenizer, rule):
    folder = saved(tmp_path, tokenizer)
    if rule in KNOWN:
        changed(folder, KNOWN[rule])
    to_gguf(folder, tmp_path / "a.gguf", "f16", progress=False)
    theirs = llama_cpp(tmp_path / "a.gguf", TEXTS, PACKAGES)
    ours = PreTrainedTokenizerFast.from_pretrained(folder)
    assert theirs["tokens"] == [ours(text)["input_ids"] for text in TEXTS]
    assert theirs["template"] == ours.chat_template


LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS = {
    "Llama": {},
    "Llama, tied": {"tie_word_embeddings": True},
    "Llama, rope scaling": {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {},
}


CASES = [(name, "f16") for name in MODELS] + [("Llama", format) for format in ("q8_0", "q4_0", "q4_1")]


@pytest.mark.parametrize("name, format", CASES)
def test_it_answers_as_transformers_does(tmp_path, tokenizer, name, format):
    """With the weights of the file. Each token that it chooses is the best, or as good but for its rounding of inputs.

    That moves logits by a part of their spread: to float16 for F16, to 8 bits for the others.
    """
    part = 0.02 if format == "f16" else 0.2
    folder = saved(tmp_path, tokenizer, name.split(",")[0], **MODELS[name])
    to_gguf(folder, tmp_path / "a.gguf", format, progress=False)
    theirs = llama_cpp(tmp_path / "a.gguf", TEXTS, PACKAGES)
    assert sum(map(len, theirs["answers"])) > 10
    model = with_weights_of(tmp_path / "a.gguf", folder)
    for prompt, answer in zip(theirs["tokens"], theirs["answers"], strict=True):
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 :]
        best = logits.max(-1).values
        chosen = logits[: len(answer)].gather(-1, torch.tensor(answer)[:, None])[:, 0]
        assert (best[: len(answer)] - chosen).max() <= part * logits.std(), (prompt, answer)
