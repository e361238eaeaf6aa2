"""Tokens without an embedding and rows without positions are named before torch stumbles over them."""

import warnings

import pytest
import torch

from qlora_lab.data.dataset import Encoded
from qlora_lab.train.limits import (
    check_length,
    check_tokens,
    fill_id,
    position_limit,
    stored_positions,
    too_long,
    unknown_token,
    used_tokens,
)
from tests.model.families import FAMILIES, tiny

STORED = ["BioGpt", "CTRL", "CodeGen", "GPT2", "GPTBigCode", "GPTJ", "OPT"]  # those whose look-ups torch refuses
NO_LIMIT = ["Bloom", "Mamba", "Mamba2", "RecurrentGemma"]  # their configurations name none
pytestmark = pytest.mark.usefixtures("one_thread")


# -------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("pad, end, fill", [("[PAD]", None, 2), ("<|im_start|>", None, 1), (None, "[PAD]", 0)])
def test_rows_are_filled_by_a_token_that_has_an_embedding(tiny_llama, tokenizer, pad, end, fill):
    tokenizer.pad_token = pad
    tokenizer.eos_token = end or tokenizer.eos_token
    if "[PAD]" in (pad, end):
        tokenizer.add_special_tokens({"pad_token" if pad else "eos_token": "[PAD]"})
    assert fill_id(tiny_llama, tokenizer) == fill


def test_a_tokenizer_without_pad_and_end_fills_by_the_first_token(tiny_llama, tokenizer):
    tokenizer.pad_token = tokenizer.eos_token = None
    assert fill_id(tiny_llama, tokenizer) == 0


def test_tokens_without_an_embedding(tiny_llama, tokenizer):
    tokenizer.add_tokens(["<think>"])
    check_tokens(tiny_llama, tokenizer, [])
    check_tokens(tiny_llama, tokenizer, {0, 279})
    with pytest.raises(ValueError, match="'<think>' has id 280, but the embedding has 280 rows: call model.resize_"):
        check_tokens(tiny_llama, tokenizer, {3, 280})
    assert unknown_token(tiny_llama, tokenizer, [-1, 5]).startswith(
        "a token has id -1, but ids are whole numbers from 0"
    )


def test_what_a_step_reads_and_learns():
    assert used_tokens([Encoded([1, 2], [-100, 7]), Encoded([3], [-100])]) == {1, 2, 3, 7}


# ------------------------------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_a_family_does_beyond_its_positions(family):
    """The right value is what transformers does with a row of 65 tokens, on the CPU, where an error kills nothing."""
    model = tiny(family)
    ids = torch.ones(1, 65, dtype=torch.long)
    try:
        model(input_ids=ids, attention_mask=ids, use_cache=False)
        fails = False
    except (IndexError, RuntimeError):
        fails = True
    assert fails == (family in [*STORED, "Mpt"])
    assert too_long(model, 64) is None
    fault = too_long(model, 65)
    if family in NO_LIMIT or family == "GptOss":  # whose rotary scaling reaches 131,072
        assert fault is None
    else:
        assert fault[0] == ("problem" if fails else "warning")
        assert (stored_positions(model, 64) == 64) == (family in STORED)


def test_a_table_of_as_many_rows_as_there_are_tokens():
    """Both are looked up; the token is always the same, the position is not."""
    assert stored_positions(tiny("GPT2", vocab_size=64), 64) == 64
    assert stored_positions(tiny("OPT", vocab_size=66), 64) == 64  # and two rows that no position has


@pytest.mark.parametrize(
    "scaling, limit",
    [
        (None, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),  # as Qwen2.5 is extended
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8}, 64),  # as Llama 3.1 is stored
    ],
)
def test_rotary_scaling_counts(scaling, limit):
    options = {}
    if scaling:
        if scaling["rope_type"] == "llama3":
            scaling = scaling | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        options["rope_parameters"] = scaling | {"rope_theta": 10000.0}
    assert position_limit(tiny("Llama", **options)) == limit


def test_scaling_by_kind_of_layer():
    """Gemma 3's layers that see everything are scaled, and those that see a window are not."""
    model = tiny("Llama")
    full, window = {"rope_type": "linear", "factor": 8.0}, {"rope_type": "default"}
    model.config.rope_parameters = {"full_attention": full, "sliding_attention": window}
    assert position_limit(model) == 512


def test_only_rows_that_are_longer_are_told():
    model = tiny("Llama")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        check_length(model, 64, "an example", "leave it out")
        assert not told
        check_length(model, 65, "an example", "leave it out")
    (one,) = told
    assert str(one.message) == (
        "an example has 65 tokens, but LlamaForCausalLM was made for 64 positions and gets worse beyond them: "
        "leave it out"
    )
    with pytest.raises(ValueError, match="an example has 65 tokens, but OPTForCausalLM stores 64 positions: leave it"):
        check_length(tiny("OPT"), 65, "an example", "leave it out")


def test_memory_that_runs_out_is_no_limit_of_the_model(monkeypatch):
    model = tiny("Llama")

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("qlora_lab.train.limits.answer_loss", full)
    assert too_long(model, 65)[0] == "warning"


def test_trying_leaves_the_model_as_it_was(tiny_llama):
    tiny_llama.config.max_position_embeddings = 8
    tiny_llama.train()
    state = torch.get_rng_state()
    assert too_long(tiny_llama, 9)[0] == "warning"
    assert tiny_llama.training and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in tiny_llama.parameters())
