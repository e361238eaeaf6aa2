"""Held-out examples: what loss has the model on answers it never saw, and what does it answer itself?

In: a model of transformers, and examples or their tokens. Out: a mean loss in nats per answer token, or texts.

Measuring changes nothing: no weight, no gradient, no random state, no training flag. (There are libraries where it
does.)

Not here: the loss itself (finetune/loss.py), the loss on running text (perplexity.py).
"""

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from qlora_lab.finetune.data import encode_all, end_token_id, pad_token_id, prompt_ids, to_device
from qlora_lab.finetune.examples import Example, Turns
from qlora_lab.finetune.loss import held_out_loss
from qlora_lab.finetune.modes import measuring
from qlora_lab.measure.rouge import rouge_l

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

MAX_LENGTH = 512  # tokens of prompt and answer: 99 % of the held-out docstrings
ANSWER_TOKENS = 40  # 99 % of their summaries have at most 37
ANSWERS_AT_ONCE = 25  # each new token unpacks every weight once, whether for one answer or for many
# Each is said because what is left out comes from the model's own configuration: Llama 2 samples at temperature 0.6.
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class HeldOut:
    """Mean loss in nats per answer token, mean ROUGE-L F-measure in [0, 1], and the model's answers it is about."""

    loss: float
    rouge_l: float
    answers: list[str]


def held_out(model: torch.nn.Module, tokenizer: "Tokenizer", examples: list[Example]) -> HeldOut:
    """Loss and ROUGE-L of the model on `examples`, which must have been kept out of its training.

    Examples of more than MAX_LENGTH tokens count in ROUGE-L but not in the loss.
    """
    encoded, _ = encode_all(examples, tokenizer, MAX_LENGTH)
    loss = held_out_loss(model, encoded)
    answers = generate_answers(model, tokenizer, examples)
    return HeldOut(loss, fmean(rouge_l(answers, [example.answer for example in examples])), answers)


def generate(model: torch.nn.Module, tokenizer: "Tokenizer", question: str, max_new_tokens: int = 128) -> str:
    """The model's greedy answer to one question of a user, under the tokenizer's chat template."""
    return _answers(model, tokenizer, [(("user", question),)], max_new_tokens)[0]


def generate_answers(
    model: torch.nn.Module, tokenizer: "Tokenizer", examples: list[Example], max_new_tokens: int = ANSWER_TOKENS
) -> list[str]:
    """The model's own greedy answers to the prompts of `examples`, without special tokens and outer white space."""
    return _answers(model, tokenizer, [example.prompt for example in examples], max_new_tokens)


def _answers(model: torch.nn.Module, tokenizer: "Tokenizer", prompts: list[Turns], max_new_tokens: int) -> list[str]:
    from transformers import GenerationConfig

    rows = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    stop, pad = _stop_ids(model, tokenizer), pad_token_id(tokenizer)
    config = GenerationConfig(**GREEDY, max_new_tokens=max_new_tokens, eos_token_id=stop, pad_token_id=pad)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # little padding
    answers = {}
    with measuring(model):
        for start in tqdm(range(0, len(rows), ANSWERS_AT_ONCE), "answers", unit="batch", leave=False):
            chosen = order[start : start + ANSWERS_AT_ONCE]
            batch = to_device(_left_padded([rows[i] for i in chosen], pad), model)
            generated = model.generate(**batch, generation_config=config)
            new = generated[:, batch["input_ids"].shape[1] :]  # (batch, at most max_new_tokens)
            answers |= zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True)
    return [answers[i].strip() for i in range(len(rows))]


def _stop_ids(model: torch.nn.Module, tokenizer: "Tokenizer") -> list[int]:
    """The template's end token, and what the model's own configuration stops at: one id, several, or none."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({end_token_id(tokenizer), *own} - {None})


def _left_padded(prompts: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, (batch, longest), filled on the left so that all rows end where answers begin."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    masks = [torch.ones_like(row) for row in rows]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left"),
        "attention_mask": pad_sequence(masks, batch_first=True, padding_side="left"),
    }
