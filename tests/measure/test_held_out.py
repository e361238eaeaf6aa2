"""Loss and answers on held-out examples equal the slow, plain way to get them, and measuring leaves no trace."""

import math

import pytest
import torch

from qlora_lab.finetune.data import encode, encode_all, end_token_id, prompt_ids
from qlora_lab.finetune.examples import Example
from qlora_lab.finetune.loss import held_out_loss
from qlora_lab.finetune.modes import measuring
from qlora_lab.measure.held_out import generate, generate_answers, held_out
from qlora_lab.measure.rouge import rouge_l

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


def test_batched_answers_equal_a_greedy_loop(tiny_llama, tokenizer):
    expected = []
    for example in EXAMPLES:
        ids = prompt_ids(example.prompt, tokenizer)
        new = []
        while len(new) < 6 and end_token_id(tokenizer) not in new:
            new.append(int(tiny_llama(torch.tensor([ids + new])).logits[0, -1].argmax()))
        expected.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    # A model's own configuration may ask for sampling, as Llama 2's does: answers stay greedy.
    tiny_llama.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=9.0)
    assert generate_answers(tiny_llama, tokenizer, EXAMPLES, max_new_tokens=6) == expected
    assert len(set(expected)) > 3
    question = EXAMPLES[0].prompt[0][1]
    assert generate(tiny_llama, tokenizer, question, max_new_tokens=6) == expected[0]


def test_an_answer_stops_at_the_templates_end_token(tiny_llama, tokenizer):
    """A model that says nothing but the end token of the template, which here is not the eos token."""
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")
    seen = []
    tiny_llama.lm_head.register_forward_hook(
        lambda module, inputs, logits: seen.append(len(logits)) or logits.index_fill(-1, torch.tensor([0]), 1e9)
    )
    assert generate_answers(tiny_llama, tokenizer, EXAMPLES[:8]) == [""] * 8
    assert seen == [8]  # one step, for all eight


def test_held_out_joins_loss_and_rouge(tiny_llama, tokenizer):
    result = held_out(tiny_llama, tokenizer, EXAMPLES[:3])
    scores = rouge_l(result.answers, [example.answer for example in EXAMPLES[:3]])
    assert result.rouge_l == pytest.approx(sum(scores) / 3)
    assert result.loss == held_out_loss(tiny_llama, encode_all(EXAMPLES[:3], tokenizer, 512)[0])


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
