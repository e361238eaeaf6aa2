"""Judge a model on held-out examples: its loss on answers it never saw, and the answers it writes itself.

Measuring changes no weight, no gradient, no random state and no training flag. (In some libraries it does.)
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from qlora_lab.data.dataset import IGNORED, Encoded, Prompt, encode_held_out, prompt_of, to_device
from qlora_lab.data.examples import Example
from qlora_lab.data.pictures import check_placeholders, picture_inputs
from qlora_lab.files.home import expanded
from qlora_lab.infer.fallback import own_configuration_aside, stop_ids, until
from qlora_lab.measure.rouge import rouge_l
from qlora_lab.model.loaded import check_pair
from qlora_lab.model.modes import measuring
from qlora_lab.model.token_dependence import reads_padding
from qlora_lab.quant.numbers import check_whole
from qlora_lab.train.limits import check_length, check_pictures, check_tokens, fill_id, used_tokens
from qlora_lab.train.loss import held_out_loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

MAX_LENGTH = 512  # tokens of prompt and answer: 99 % of the held-out docstrings
ANSWER_TOKENS = 40  # 99 % of their summaries have at most 37 tokens
ANSWERS_AT_ONCE = 25  # each new token unpacks every weight once, for any number of answers


@dataclass(frozen=True)
class HeldOut:
    """How well a model answers examples that it never saw."""

    loss: float  # mean, nats per answer token
    rouge_l: float  # mean F-measure of `answers`, in [0, 1]
    answers: list[str]  # the model's own


def held_out(
    model: torch.nn.Module,
    tokenizer: "Tokenizer",
    examples: list[Example],
    *,
    max_length: int = MAX_LENGTH,
    progress: bool = True,
) -> HeldOut:
    """Measure loss and ROUGE-L on `examples`, which the model's training must not have seen.

    max_length: tokens; longer examples count in ROUGE-L but not in the loss, with a warning that says how many. Raises
    ValueError for a token without an embedding in the model, for a row that is longer than the model's table of
    positions, for a picture that its tower cannot read, and if no example is short enough.
    """
    check_pair(model, tokenizer)
    check_whole("max_length", max_length)
    encoded = encode_held_out(examples, tokenizer, max_length, "the held-out loss", progress)
    check_tokens(model, tokenizer, used_tokens(encoded))
    longest = max(len(example.input_ids) for example in encoded)
    check_length(model, longest, "a held-out example", "take shorter ones")
    check_pictures(model, encoded)
    loss = held_out_loss(model, encoded, progress)
    answers = generate_answers(model, tokenizer, examples, progress=progress)
    return HeldOut(loss, fmean(rouge_l(answers, [example.answer for example in examples])), answers)


def generate(
    model: torch.nn.Module,
    tokenizer: "Tokenizer",
    question: str,
    max_new_tokens: int = 128,
    *,
    pictures: str | Path | Iterable[str | Path] = (),
    progress: bool = True,
) -> str:
    """Answer a user's question greedily, under the tokenizer's chat template. Raises what held_out raises.

    pictures: an image file for a model that sees, or several, in the order of `<image>` in the question, which stands
    for each. Raises ValueError for more or fewer of them.
    """
    paths = [pictures] if isinstance(pictures, (str, Path)) else pictures  # a path alone is not one of its letters
    turns = ("user", question), ("assistant", "")  # only asked
    files = tuple(map(expanded, paths))
    check_placeholders(turns, files, "the question")
    asked = Example(turns, pictures=files)
    return generate_answers(model, tokenizer, [asked], max_new_tokens, progress=progress)[0]


def generate_answers(
    model: torch.nn.Module,
    tokenizer: "Tokenizer",
    examples: list[Example],
    max_new_tokens: int = ANSWER_TOKENS,
    *,
    progress: bool = True,
) -> list[str]:
    """Answer the prompts of `examples` greedily. Special tokens and outer white space are stripped."""
    check_pair(model, tokenizer)
    check_whole("max_new_tokens", max_new_tokens)
    prompts = [prompt_of(example, tokenizer) for example in examples]
    return answers_to(model, tokenizer, prompts, max_new_tokens, progress)


def answers_to(
    model: torch.nn.Module,
    tokenizer: "Tokenizer",
    prompts: list[Prompt],
    max_new_tokens: int,
    progress: bool,
    around: Callable[[list[int]], AbstractContextManager] | None = None,
) -> list[str]:
    """Answer prompts greedily. around: numbers of the prompts in a batch -> what to enter while it is answered."""
    from transformers import GenerationConfig  # heavy, so not at the top

    rows = [prompt.ids for prompt in prompts]
    check_tokens(model, tokenizer, {token for row in rows for token in row})
    longest = max(map(len, rows)) + max_new_tokens - 1  # the model never reads the last token
    fix = "ask a shorter question, or take fewer max_new_tokens (--max-new-tokens)"
    check_length(model, longest, "a prompt with its answer", fix)
    # A tower's own error comes from deep inside it. The price is a second pass over a prompt for each shape of picture.
    check_pictures(model, [_as_example(prompt) for prompt in prompts if prompt.pictures])
    stop = stop_ids(model, tokenizer)
    fill = fill_id(model, tokenizer)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stop, pad_token_id=fill)
    batches = _at_once(model, rows, fill)
    answers = {}  # number of the row -> text
    with measuring(model), own_configuration_aside(model):
        for chosen in tqdm(batches, "answers", unit="batch", leave=False, disable=not progress):
            batch = _left_padded([rows[i] for i in chosen], fill)
            batch |= picture_inputs([prompts[i].pictures for i in chosen], batch["input_ids"])
            batch = to_device(batch, model)
            with around(chosen) if around else nullcontext():
                generated = model.generate(**batch, generation_config=greedy)  # (batch, prompt + answer)
            new = generated[:, batch["input_ids"].shape[1] :].tolist()  # (batch, at most max_new_tokens)
            texts = tokenizer.batch_decode([until(row, stop) for row in new], skip_special_tokens=True)
            answers |= zip(chosen, texts, strict=True)
    return [answers[i].strip() for i in range(len(rows))]  # in the order of the prompts


def _as_example(prompt: Prompt) -> Encoded:
    """Make an example of a prompt. One token is a label, so the head computes one row of logits."""
    return Encoded(prompt.ids, [IGNORED] * (len(prompt.ids) - 1) + prompt.ids[-1:], pictures=prompt.pictures)


def _at_once(model: torch.nn.Module, rows: list[list[int]], fill: int) -> list[list[int]]:
    """Group rows to answer together: of similar length, or of equal length if the model does not ignore padding."""
    lengths = [len(row) for row in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__)  # neighbours need little padding
    groups = [order]
    if min(lengths) < max(lengths) and reads_padding(model, rows[order[0]], fill):
        groups = [list(group) for _, group in groupby(order, key=lengths.__getitem__)]
    return [
        group[start : start + ANSWERS_AT_ONCE] for group in groups for start in range(0, len(group), ANSWERS_AT_ONCE)
    ]


def _left_padded(prompts: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """Make input_ids and attention_mask, (batch, longest), padded on the left so that all answers begin together."""
    rows = [torch.tensor(prompt, dtype=torch.int64) for prompt in prompts]
    masks = [torch.ones_like(row) for row in rows]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left"),
        "attention_mask": pad_sequence(masks, batch_first=True, padding_side="left"),
    }
