"""Data: examples become token ids and labels, labels become batches.

In: "docstrings" or a file of the user's, and the model's tokenizer. Out: batches of input_ids, attention_mask and
labels, each (batch, longest) int64, a label being the token itself where it is learned and -100 where it is not.

    load_data -> [Example] -> encode -> Encoded -> collate -> batch        Batches (batches.py) says which come next

Learned are the answers and the token that ends each answer, nothing else: a model that never sees the end token as a
label never stops. Padding is masked by position and not by id, so a pad token that equals the end token hides nothing.
Examples that are too long are left out whole and counted: a cut answer loses its end token, a cut prompt asks about
half a function.

Not here: which examples make a batch, and several examples in one row (batches.py).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from qlora_lab.finetune.docstrings import docstring_split
from qlora_lab.finetune.examples import Example, Turns, read_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

IGNORED = -100  # the ignore_index of torch.nn.functional.cross_entropy

# For a tokenizer without a chat template, as of a base Llama 2.
PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{% if message.role == 'user' %}{{ '### Instruction:\\n' }}"
    "{% elif message.role == 'assistant' %}{{ '### Response:\\n' }}{% endif %}"
    "{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
)
PROBE = Example((("user", "2 + 2?"), ("assistant", "4")))  # any conversation shows which token ends an answer


@dataclass(frozen=True)
class Encoded:
    """One example in tokens: input_ids and labels, equally long lists of ids."""

    input_ids: list[int]
    labels: list[int]

    @property
    def answer_tokens(self) -> int:
        """Labels that a model is asked for: the first token of all has nothing before it."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class EncodeReport:
    """What became of a data set: numbers of examples, and of tokens in those that were kept."""

    kept: int
    too_long: int
    longest: int  # tokens of the longest example, left out or not
    tokens: int
    learned_tokens: int


def load_data(source: str | Path, split: str = "train", *, progress: bool = True) -> list[Example]:
    """The examples of "docstrings" (splits "train" and "test") or of a file (one split, "train").

    Raises ValueError for an unknown split, and what read_examples raises for a file.
    """
    if source == "docstrings":
        return docstring_split(split, progress)
    if split != "train":
        raise ValueError(f'unknown split {split!r} of {source}: a file is all "train"; test on a second file')
    return read_examples(source)


def prompt_ids(messages: Turns, tokenizer: "Tokenizer") -> list[int]:
    """The tokens a model is given before it answers: the conversation so far and the opening of an answer."""
    return _render(messages, tokenizer, opens_answer=True)


def encode(example: Example, tokenizer: "Tokenizer") -> Encoded:
    """The conversation through the tokenizer's chat template (or PLAIN_TEMPLATE), answers and end tokens as labels.

    Raises ValueError if the template does not extend a conversation token by token, or ends no answer by a token of
    its own: what is learned would then differ from what the model is asked.
    """
    ids = _render(example.messages, tokenizer, opens_answer=False)
    labels = [IGNORED] * len(ids)
    for i, (role, _) in enumerate(example.messages):
        if role == "assistant":
            start, stop = _answer_span(example.messages[: i + 1], ids, tokenizer)
            labels[start:stop] = ids[start:stop]
    return Encoded(ids, labels)


def encode_all(
    examples: list[Example], tokenizer: "Tokenizer", max_length: int, enough: int | None = None, progress: bool = True
) -> tuple[list[Encoded], EncodeReport]:
    """The first `enough` examples of at most `max_length` tokens, in their order, and a count of those passed over.

    About 1 ms an example, so ask for as many as the training will see; None asks for all. Raises ValueError if none
    is short enough.
    """
    kept, lengths = [], []
    for example in tqdm(examples, "tokens", unit="example", leave=False, disable=not progress):
        encoded = encode(example, tokenizer)
        lengths.append(len(encoded.input_ids))
        if lengths[-1] <= max_length:
            kept.append(encoded)
        if len(kept) == enough:
            break
    longest = max(lengths, default=0)
    if not kept:
        raise ValueError(f"no example has at most {max_length} tokens (the longest has {longest}): allow more of them")
    learned = sum(label != IGNORED for encoded in kept for label in encoded.labels)
    tokens = sum(len(encoded.input_ids) for encoded in kept)
    return kept, EncodeReport(len(kept), len(lengths) - len(kept), longest, tokens, learned)


def end_token_id(tokenizer: "Tokenizer") -> int:
    """The token that ends an answer under the tokenizer's template, which generation must stop at.

    It need not be tokenizer.eos_token_id: a chat template may end turns by a token of its own.
    """
    return [label for label in encode(PROBE, tokenizer).labels if label != IGNORED][-1]


def show_labels(encoded: Encoded, tokenizer: "Tokenizer") -> list[tuple[str, bool]]:
    """(text of the token, whether it is learned) for each token: what a notebook colours."""
    texts = [tokenizer.decode([token]) for token in encoded.input_ids]
    return list(zip(texts, (label != IGNORED for label in encoded.labels), strict=True))


def collate(batch: list[Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """Examples -> input_ids, attention_mask, labels, each (batch, longest of this batch) int64, filled on the right."""
    rows = [torch.tensor(encoded.input_ids) for encoded in batch]
    labels = [torch.tensor(encoded.labels) for encoded in batch]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_id),
        # From the lengths and not from `input_ids != pad_id`, which would mask real end tokens where both are one.
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def to_device(batch: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The batch on the device of the model's parameters."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def pad_token_id(tokenizer: "Tokenizer") -> int:
    """An id to fill rows with: the pad token, else the end token. It is masked, so its choice changes no result."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _render(messages: Turns, tokenizer: "Tokenizer", opens_answer: bool) -> list[int]:
    if not tokenizer.chat_template and tokenizer.eos_token is None:
        raise ValueError("the tokenizer has neither a chat template nor an eos token: set tokenizer.eos_token")
    try:
        return tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            chat_template=None if tokenizer.chat_template else PLAIN_TEMPLATE,  # None: the tokenizer's own
            add_generation_prompt=opens_answer,
            tokenize=True,
            return_dict=False,
        )
    except TemplateError as error:
        opening = f"{messages[0][0]}: {messages[0][1][:60]!r}"
        raise ValueError(f"the chat template refuses the conversation that begins {opening}: {error}") from error


def _answer_span(turns: Turns, ids: list[int], tokenizer: "Tokenizer") -> tuple[int, int]:
    """First and one-past-last position of the last answer of `turns` in the whole conversation's `ids`."""
    before = prompt_ids(turns[:-1], tokenizer)
    after = _render(turns, tokenizer, opens_answer=False)
    if ids[: len(before)] != before or ids[: len(after)] != after:
        raise ValueError(
            f"the chat template does not extend a conversation token by token at the answer {turns[-1][1][:60]!r}: "
            "it rewrites earlier turns, or the answer melts into the prompt's last token; use another template"
        )
    # A template may write more after the end token (ChatML a line break), which generation never reaches.
    added = tokenizer.added_tokens_decoder
    ends = [i for i in range(len(before), len(after)) if ids[i] in added and added[ids[i]].special]
    if not ends:
        raise ValueError(f"the chat template ends {turns[-1][1][:60]!r} by no special token: a model would never stop")
    return len(before), ends[-1] + 1
