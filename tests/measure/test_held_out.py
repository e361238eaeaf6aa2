"""Loss and answers on held-out examples equal the slow, plain way to get them, and measuring leaves no trace."""

import json
import math

import pytest
import torch
from transformers import GenerationConfig

import qlora_lab as ql
from qlora_lab.data.dataset import encode, encode_all, end_token_id, prompt_ids
from qlora_lab.data.examples import Example
from qlora_lab.measure.held_out import generate, generate_answers, held_out
from qlora_lab.measure.rouge import rouge_l
from qlora_lab.model.modes import measuring
from qlora_lab.train.loss import held_out_loss
from tests.model.families import tiny

EXAMPLES = [
    Example((("user", f"Add 2 and {i}. " * i), ("assistant", "The sum is " + "4 " * i + "."))) for i in range(1, 11)
] + [Example((("user", "Why? " * 9), ("assistant", "So."), ("user", "And?"), ("assistant", "the two numbers")))]


@pytest.fixture
def trained(tiny_llama):
    """In training mode, but for one module, and with gradients: the state that measuring must leave alone."""
    tiny_llama.train()
    tiny_llama.model.norm.eval()
    for parameter in tiny_llama.parameters():
        parameter.grad = torch.ones_like(parameter)
    return tiny_llama


def plain_loss(model, encoded) -> tuple[float, int]:
    """Token by token, one example at a time."""
    logits = model(torch.tensor([encoded.input_ids])).logits[0].log_softmax(dim=-1)
    labels = [(i, label) for i, label in enumerate(encoded.labels) if label != -100]
    return -sum(logits[i - 1, label].item() for i, label in labels), len(labels)


def test_the_loss_weighs_each_answer_token_once(tiny_llama, tokenizer):
    encoded, _ = encode_all(EXAMPLES, tokenizer, 512)
    losses, tokens = zip(*(plain_loss(tiny_llama, one) for one in encoded), strict=True)
    assert held_out_loss(tiny_llama, encoded) == pytest.approx(sum(losses) / sum(tokens), rel=1e-5)


def test_a_model_that_knows_nothing_loses_the_log_of_the_vocabulary(tiny_llama, tokenizer):
    torch.nn.init.zeros_(tiny_llama.lm_head.weight)
    assert held_out_loss(tiny_llama, [encode(EXAMPLES[0], tokenizer)]) == pytest.approx(math.log(280))


def test_no_examples_are_an_error(tiny_llama):
    with pytest.raises(ValueError, match="no held-out examples"):
        held_out_loss(tiny_llama, [])


def greedy(model, tokenizer, example, tokens) -> str:
    """The most likely token, again and again, by nothing but the model."""
    ids, new = prompt_ids(example.prompt, tokenizer), []
    while len(new) < tokens and end_token_id(tokenizer) not in new:
        new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.long
def test_batched_answers_equal_a_greedy_loop(tiny_llama, tokenizer):
    expected = [greedy(tiny_llama, tokenizer, example, 6) for example in EXAMPLES]
    # A model's own configuration may ask for sampling, as Llama 2's does: answers stay greedy.
    tiny_llama.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=9.0)
    assert generate_answers(tiny_llama, tokenizer, EXAMPLES, max_new_tokens=6) == expected
    assert len(set(expected)) > 3
    question = EXAMPLES[0].prompt[0][1]
    assert generate(tiny_llama, tokenizer, question, max_new_tokens=6) == expected[0]


@pytest.mark.long
@pytest.mark.parametrize("family", ["Rwkv", "RecurrentGemma", "Mamba", "Bloom"])
def test_batched_answers_of_other_families(family, tokenizer):
    """RWKV and RecurrentGemma take in what fills a row, though it is masked: their rows must be of equal length."""
    model = tiny(family, vocab_size=280)
    expected = [greedy(model, tokenizer, example, 4) for example in EXAMPLES[:4]]
    assert generate_answers(model, tokenizer, EXAMPLES[:4], max_new_tokens=4) == expected


SUPPRESSED = list(range(200))
ODD = {  # a value that is not neutral, for each field of GenerationConfig that says how tokens are chosen
    "assistant_confidence_threshold": 0.9,
    "assistant_early_exit": 1,
    "assistant_ensemble_weight": 0.5,
    "assistant_lookbehind": 3,
    "bad_words_ids": [[token] for token in SUPPRESSED],
    "begin_suppress_tokens": SUPPRESSED,
    "bos_token_id": 5,
    "cache_config": {"batch_size": 1},
    "cache_implementation": "static",
    "compile_config": {"mode": "none of torch's"},
    "constraints": ["one"],
    "continuous_batching_config": {"block_size": 1},
    "decoder_start_token_id": 5,
    "disable_compile": True,
    "diversity_penalty": 9.0,
    "do_sample": True,
    "dola_layers": "high",
    "early_stopping": True,
    "encoder_no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 9.0,
    "epsilon_cutoff": 0.9,
    "eta_cutoff": 0.9,
    "exponential_decay_length_penalty": [1, 1e9],
    "force_words_ids": [[5]],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 5,
    "guidance_scale": 9.0,
    "is_assistant": True,
    "length_penalty": -9.0,
    "low_memory": True,
    "max_cache_len": 2,
    "max_length": 2,
    "max_matching_ngram_size": 2,
    "max_new_tokens": 1,
    "max_time": 0.0,
    "min_length": 99,
    "min_new_tokens": 6,
    "min_p": 0.9,
    "no_repeat_ngram_size": 1,
    "num_assistant_tokens": 1,
    "num_assistant_tokens_schedule": "heuristic",
    "num_beam_groups": 2,
    "num_beams": 3,
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_logits": True,
    "output_scores": True,
    "pad_token_id": 5,
    "penalty_alpha": 0.6,
    "prefill_chunk_size": 2,
    "prompt_lookup_num_tokens": 3,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "repetition_penalty": 9.0,
    "return_dict_in_generate": True,
    "sequence_bias": [[[token], -99.0] for token in SUPPRESSED],
    "speculation_type": "none of theirs",
    "stop_strings": ["e", " "],
    "suppress_tokens": SUPPRESSED,
    "target_lookbehind": 3,
    "temperature": 9.0,
    "token_healing": True,
    "top_h": 0.1,
    "top_k": 1,
    "top_p": 0.1,
    "typical_p": 0.1,
    "use_cache": False,
    "use_mtp": True,
    "watermarking_config": {"bias": 99.0},
    "an entry of the folder's own": "carried over by transformers",
}
ENDS = {"eos_token_id"}  # what an answer stops at is the model's own to say
METADATA = {"transformers_version"}


@pytest.mark.long
def test_no_field_of_a_generation_config_changes_an_answer(tiny_llama, tokenizer):
    """The right value is the argmax loop. In a list, since most fields that were let through broke it, or raised."""
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - ENDS - METADATA
    assert fields <= ODD.keys(), "a new version has new fields: say a value for each"
    expected = [greedy(tiny_llama, tokenizer, example, 4) for example in EXAMPLES[:2]]
    own, changed = tiny_llama.generation_config, []
    for name, value in ODD.items():
        tiny_llama.generation_config = odd = GenerationConfig()
        setattr(odd, name, value)
        if generate_answers(tiny_llama, tokenizer, EXAMPLES[:2], max_new_tokens=4) != expected:
            changed.append(name)
        assert tiny_llama.generation_config is odd
    assert changed == [] and own is not odd


def test_the_generation_config_comes_back_after_an_error(tiny_llama, tokenizer):
    own = tiny_llama.generation_config
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(tiny_llama, tokenizer, "?", max_new_tokens=0)
    assert tiny_llama.generation_config is own


@pytest.mark.long
def test_a_folder_whose_configuration_forbids_its_tokens_answers_all_the_same(folder, tiny_llama, tokenizer):
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"suppress_tokens": SUPPRESSED, "no_repeat_ngram_size": 1, "penalty_alpha": 0.6}))
    model, _ = ql.load(folder, None, dtype=torch.float32, progress=False)
    assert model.generation_config.no_repeat_ngram_size == 1
    expected = [greedy(tiny_llama, tokenizer, example, 6) for example in EXAMPLES]
    assert generate_answers(model, tokenizer, EXAMPLES, max_new_tokens=6, progress=False) == expected


def test_the_ends_of_the_models_own_configuration_count(tiny_llama, tokenizer):
    """Llama 3 ends its turns by one token and its texts by another."""
    prompt = prompt_ids(EXAMPLES[0].prompt, tokenizer)
    likeliest = int(tiny_llama(torch.tensor([prompt])).logits[0, -1].argmax())
    tiny_llama.generation_config.eos_token_id = [likeliest]
    assert generate_answers(tiny_llama, tokenizer, EXAMPLES[:1], max_new_tokens=6) == [""]


# ------------------------------------------------------------------------------------------------ what cannot be read


@pytest.mark.long
def test_a_pad_token_without_an_embedding_fills_nothing(tiny_llama, tokenizer):
    """Answers of unlike lengths are filled up on both sides, by a token that the model has."""
    expected = held_out(tiny_llama, tokenizer, EXAMPLES)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == tiny_llama.config.vocab_size
    assert held_out(tiny_llama, tokenizer, EXAMPLES) == expected


def test_a_token_without_an_embedding_is_named(tiny_llama, tokenizer):
    tokenizer.add_tokens(["<think>"])
    example = Example((("user", "<think> of two numbers"), ("assistant", "one")))
    words = "'<think>' has id 280, but the embedding has 280 rows"
    for call in (held_out, generate_answers):
        with pytest.raises(ValueError, match=words):
            call(tiny_llama, tokenizer, [example])
    with pytest.raises(ValueError, match=words):
        generate(tiny_llama, tokenizer, "<think>")


def test_an_answer_beyond_the_positions(tokenizer):
    """With 64 stored positions 52 tokens of a prompt leave room for 13 new ones: the last is not read."""
    model = tiny("OPT", vocab_size=280)
    question = "two " * 9
    length = len(prompt_ids((("user", question),), tokenizer))
    room = 64 - length + 1
    assert isinstance(generate(model, tokenizer, question, max_new_tokens=room), str)
    with pytest.raises(ValueError, match="a prompt with its answer has 65 tokens, but OPTForCausalLM stores 64 posi"):
        generate(model, tokenizer, question, max_new_tokens=room + 1)
    model = tiny("Llama", vocab_size=280)
    with pytest.warns(UserWarning, match="has 65 tokens, but LlamaForCausalLM was made for 64 positions"):
        generate(model, tokenizer, question, max_new_tokens=room + 1)
    with pytest.raises(
        ValueError, match=r"stores 64 positions: ask a shorter question, or take fewer max_new_tokens \("
    ):
        generate(tiny("OPT", vocab_size=280), tokenizer, "two " * 40, max_new_tokens=1)
    long = Example((("user", "two " * 40), ("assistant", "so")))
    with pytest.raises(ValueError, match=r"a held-out example has \d+ tokens, but OPTForCausalLM stores 64 positions"):
        held_out(tiny("OPT", vocab_size=280), tokenizer, [long])


def test_an_answer_stops_at_the_templates_end_token(tiny_llama, tokenizer):
    """A model that says nothing but the end token of the template, which here is not the eos token."""
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")
    seen = []
    tiny_llama.lm_head.register_forward_hook(
        lambda module, inputs, logits: seen.append(len(logits)) or logits.index_fill(-1, torch.tensor([0]), 1e9)
    )
    assert generate_answers(tiny_llama, tokenizer, EXAMPLES[:8]) == [""] * 8
    assert seen == [1, 8]  # a row is tried, and then one step for all eight


def test_held_out_joins_loss_and_rouge(tiny_llama, tokenizer):
    result = held_out(tiny_llama, tokenizer, EXAMPLES[:3])
    scores = rouge_l(result.answers, [example.answer for example in EXAMPLES[:3]])
    assert result.rouge_l == pytest.approx(sum(scores) / 3)
    assert result.loss == held_out_loss(tiny_llama, encode_all(EXAMPLES[:3], tokenizer, 512)[0])


def test_the_limit_of_tokens_is_the_callers(tiny_llama, tokenizer):
    short, long = EXAMPLES[0], Example((("user", "two " * 200), ("assistant", "the sum")))
    tokens = len(encode(long, tokenizer).input_ids)
    assert tokens > 512
    one, both = (held_out_loss(tiny_llama, encode_all(some, tokenizer, tokens)[0]) for some in ([short], [short, long]))
    said = rf"1 of 2 examples have more than 512 tokens and do not count .*: max_length={tokens} counts all \(--max-len"
    with pytest.warns(UserWarning, match=said):
        assert held_out(tiny_llama, tokenizer, [short, long]).loss == one
    result = held_out(tiny_llama, tokenizer, [short, long], max_length=tokens)
    assert result.loss == both != one and len(result.answers) == 2
    with pytest.raises(ValueError, match="no example has at most 3 tokens: allow at least"):
        held_out(tiny_llama, tokenizer, [short], max_length=3)
    with pytest.raises(ValueError, match="max_length=0 is not allowed: it is a whole number of at least 1"):
        held_out(tiny_llama, tokenizer, [short], max_length=0)


def test_measuring_changes_no_weight_gradient_flag_or_random_state(trained, tokenizer):
    state = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    flags = [module.training for module in trained.modules()]
    random_state = torch.get_rng_state()
    first = held_out(trained, tokenizer, EXAMPLES[:3])
    assert held_out(trained, tokenizer, EXAMPLES[:3]) == first
    assert [module.training for module in trained.modules()] == flags and any(flags) and not all(flags)
    assert trained.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in trained.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in trained.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_flags_come_back_after_an_error(trained):
    with pytest.raises(KeyError), measuring(trained):
        assert not any(module.training for module in trained.modules()) and not torch.is_grad_enabled()
        raise KeyError
    assert trained.training and not trained.model.norm.training and torch.is_grad_enabled()
