"""Multiple choice: which of four answers does a model find likeliest?

In: a model, its tokenizer, Questions. Out: log-likelihoods, (questions, 4) in nats, summed over an answer's tokens.
Tokens are those of the tokenizer's own settings, with a BOS token if it adds one; so does lm-evaluation-harness, and
measure/lm_eval.py shows that the numbers are the same.

Cost: the questions of a subject share their examples, about four tokens in five. Those go through the model once, and
their keys and values serve all questions of the subject. Those of a question serve its four answers, side by side in
one row if the model keeps to a mask and to positions.
Not here: questions and prompts (data/choice_files.py, data/choice_prompts.py), accuracies (choice_summary.py), rows on
disk (choice_rows.py).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from qlora_lab.adapters.virtual_tokens import virtual_tokens
from qlora_lab.data.choice_files import group_by_subject
from qlora_lab.data.choice_prompts import Task, answers, examples, prompt
from qlora_lab.model.loaded import check_pair
from qlora_lab.model.modes import measuring
from qlora_lab.train.limits import check_tokens, fill_id, position_limit
from qlora_lab.train.rounding import tolerance

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedTokenizerBase as Tokenizer

# Tokens in one pass: enough that unpacking the weights costs little, few enough that a batch needs little memory.
TOKENS_AT_ONCE = 1024
Tails = Callable[..., list[list[float]]]  # _apart, or _side_by_side


@dataclass(frozen=True)
class Encoded:
    """A prompt and its answers, in tokens."""

    context: list[int]
    answers: tuple[list[int], ...]  # what follows the context


def encode(tokenizer: "Tokenizer", task: Task) -> list[Encoded]:
    """Return prompts and answers in tokens, in the order of the questions.

    An answer's tokens are those that the whole text has after the prompt's, as in lm-evaluation-harness. Raises what
    Task.checked and examples raise, and ValueError if the whole text does not begin with the prompt's tokens.
    """
    task = task.checked()
    encoded = []
    for subject, group in group_by_subject(task.questions.test).items():
        if group[0].prompt is not None:
            contexts = [question.prompt for question in group]
        else:
            beginning = examples(task, subject)
            contexts = [beginning + prompt(question, task.way) for question in group]
        texts = [
            c + answer for c, question in zip(contexts, group, strict=True) for answer in answers(question, task.way)
        ]
        ids = tokenizer(contexts + texts, verbose=False)["input_ids"]  # one call: it uses all cores
        # texts: four a question, in the order of the questions
        for i in range(len(group)):
            context = ids[i]
            wholes = ids[len(group) + 4 * i : len(group) + 4 * i + 4]
            # One that appends an EOS token, for example, would have it in the place of the answer's first token.
            if any(whole[: len(context)] != context for whole in wholes):
                raise ValueError(
                    f"{subject}: with an answer, the prompt of question {i + 1} has other tokens: use a tokenizer that "
                    "appends none (EOS) and does not merge a prompt's end with the answer"
                )
            encoded.append(Encoded(context, tuple(whole[len(context) :] for whole in wholes)))
            # A text without tokens has the log-likelihood 0, above all others.
            if not all(encoded[-1].answers):
                raise ValueError(f"{subject}: an option of question {i + 1} has no tokens: give each option a text")
    return encoded


def check_fits(model: torch.nn.Module, tokenizer: "Tokenizer", encoded: list[Encoded], task: Task) -> None:
    """Raise ValueError if a prompt with its answer is longer than the model was made for, or has an unknown token.

    encoded: what encode made of `task`. The error says how many examples would fit.
    """
    check_tokens(model, tokenizer, {token for one in encoded for row in (one.context, *one.answers) for token in row})
    limit = position_limit(model)
    virtual = virtual_tokens(model)  # they take positions, too
    longest = _longest(encoded) + virtual
    if limit is None or longest <= limit:
        return
    said = f"the longest prompt has {longest} tokens, but {type(model).__name__} was made for {limit}"
    if task.questions.test[0].prompt is None:
        # Rare, so nobody waits for the texts to be encoded once for each number of examples.
        for fewer in range(task.checked().shots - 1, -1, -1):
            if _longest(encode(tokenizer, replace(task, shots=fewer))) + virtual <= limit:
                raise ValueError(f"{said}: take --shots {fewer}")
    raise ValueError(f"{said}, and fewer examples do not help: leave that question out")


def _longest(encoded: list[Encoded]) -> int:
    """Return the tokens that a model reads of the longest row: the last token is only predicted."""
    return max(len(one.context) + len(answer) - 1 for one in encoded for answer in one.answers)


def choice_scores(
    model: torch.nn.Module,
    tokenizer: "Tokenizer",
    task: Task,
    *,
    encoded: list[Encoded] | None = None,
    progress: bool = True,
) -> list[tuple[float, ...]]:
    """Return the log-likelihoods of the four answers to each question, in nats and in the order of the questions.

    encoded: what `encode` made of the task, if that is there already; several models share it. Raises ValueError as
    encode and check_fits do.
    """
    check_pair(model, tokenizer)
    encoded = encode(tokenizer, task) if encoded is None else encoded
    check_fits(model, tokenizer, encoded, task)
    fill = fill_id(model, tokenizer)
    # Questions come back longest first, so each is kept under its number.
    found: dict[int, list[float]] = {}  # number of the question -> log-likelihoods
    start = 0
    with measuring(model), tqdm(total=len(encoded), desc="questions", leave=False, disable=not progress) as bar:
        for group in group_by_subject(task.questions.test).values():
            rows = dict(enumerate(encoded[start : start + len(group)], start))
            start += len(group)
            for number, values in _of_subject(model, rows, fill):
                found[number] = values
                bar.update()
    return [tuple(found[i]) for i in range(len(encoded))]


def _of_subject(model: torch.nn.Module, rows: dict[int, Encoded], fill: int) -> Iterator[tuple[int, list[float]]]:
    """Yield (number, log-likelihoods) of each question of one subject, longest first."""
    shared = _shared([one.context for one in rows.values()])
    # Virtual tokens come before each row, and some families keep other states than keys and values.
    cache = _read(model, shared) if shared and not virtual_tokens(model) else None
    if cache is None:
        yield from ((number, _alone(model, one, fill)) for number, one in rows.items())
        return
    tails_of = None  # the longest question decides
    for batch in _batches(rows, len(shared)):
        batched = [rows[number] for number in batch]
        rests = [one.context[len(shared) :] for one in batched]
        # One forward pass for all questions of the batch: weights in 4 bits are unpacked once for all of them.
        last = range(len(batch)), [len(rest) - 1 for rest in rests]
        logits, longer = _continue(model, rests, fill, _expanded(cache, len(batch)), lambda h, last=last: h[last])
        logs = logits.float().log_softmax(-1)  # (questions, vocabulary)
        values = [[logs[i, answer[0]].item() for answer in one.answers] for i, one in enumerate(batched)]
        if any(len(answer) > 1 for one in batched for answer in one.answers):  # letters have one token each
            tails_of = tails_of or _fitting(model, batched, fill, longer)
            more = tails_of(model, batched, fill, longer)
            values = [[a + b for a, b in zip(*both, strict=True)] for both in zip(values, more, strict=True)]
        yield from zip(batch, values, strict=True)


def _shared(contexts: list[list[int]]) -> list[int]:
    """Return the tokens with which all contexts begin; at least one token of each is left over.

    Counted in tokens: a token may reach over the end of the shared text.
    """
    first = min(contexts)
    last = max(contexts)  # in the order of lists, what these two share is shared by all between them
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[: min(length, min(map(len, contexts)) - 1)]


def _read(model: torch.nn.Module, ids: list[int]) -> "DynamicCache | None":
    """Return the keys and values of some tokens; None for a model that keeps, or needs, something else."""
    from transformers import DynamicCache  # heavy, so not at the top
    from transformers.cache_utils import DynamicLayer

    if model._is_stateful:  # a recurrent state stays in the model
        return None
    _, cache = _continue(model, [ids], 0, None, lambda hidden: hidden[:, -1:], use_cache=True)
    # Layers with a sliding window or a recurrent state forget, so they cannot be cut back to a question's end.
    plain = type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)
    return cache if plain and cache.get_seq_length() == len(ids) else None


def _expanded(cache: "DynamicCache", rows: int) -> "DynamicCache":
    """Return a cache for `rows` rows. It views the first one's memory, which a model never writes to: it appends."""
    return type(cache)([(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1))
                        for layer in cache.layers])  # fmt: skip


def _cut(cache: "DynamicCache", row: int, length: int) -> "DynamicCache":
    """Return the first `length` tokens of one row of a cache."""
    return type(cache)([(layer.keys[row : row + 1, :, :length], layer.values[row : row + 1, :, :length])
                        for layer in cache.layers])  # fmt: skip


def _batches(rows: dict[int, Encoded], shared: int) -> Iterator[list[int]]:
    """Group questions of similar length. What their filled rests and answers add up to stays near TOKENS_AT_ONCE."""
    batch: list[int] = []
    longest = 0
    for number in sorted(rows, key=lambda number: len(rows[number].context), reverse=True):
        length = len(rows[number].context) - shared + sum(map(len, rows[number].answers))
        longest = max(longest, length)
        if batch and (len(batch) + 1) * longest > TOKENS_AT_ONCE:
            yield batch
            batch, longest = [], length
        batch.append(number)  # a question longer than TOKENS_AT_ONCE is a batch of its own
    yield batch


def _fitting(model: torch.nn.Module, batch: list[Encoded], fill: int, cache: "DynamicCache") -> Tails:
    """Return _side_by_side if it gives what _apart gives for the first question, which is the longest; else _apart.

    No list of names says which families keep to the mask and the positions: GPT-Neo's window counts places in the
    cache, Falcon makes alibi of another mask, and MPT counts positions by itself.
    """
    one, own = batch[:1], _cut(cache, 0, cache.get_seq_length())
    (apart,) = _apart(model, one, fill, own)
    try:
        (beside,) = _side_by_side(model, one, fill, own)
    except (ValueError, RuntimeError):
        return _apart
    # Rounding differs at each token, so it adds up as a random walk; that of logits is a few times the tolerance.
    allowed = 4 * tolerance(model) * sum(map(len, one[0].answers)) ** 0.5
    same = all(abs(a - b) <= allowed for a, b in zip(apart, beside, strict=True))
    return _side_by_side if same else _apart


def _apart(model: torch.nn.Module, batch: list[Encoded], fill: int, cache: "DynamicCache") -> list[list[float]]:
    """Return, for each answer of each question, the log-likelihood of all its tokens but the first.

    cache: the prompts' keys and values, filled on the right. An answer is a row of its own, after a copy of the prompt.
    """
    found = []
    for i, one in enumerate(batch):
        own = _expanded(_cut(cache, i, len(one.context)), len(one.answers))
        # an answer of one token is read for nothing
        logits, _ = _continue(model, [answer[:-1] or [fill] for answer in one.answers], fill, own)
        logs = logits.float().log_softmax(-1)  # (4, longest, vocabulary)
        found.append([_picked(row, answer[1:]) for row, answer in zip(logs, one.answers, strict=True)])
    return found


def _side_by_side(model: torch.nn.Module, batch: list[Encoded], fill: int, cache: "DynamicCache") -> list[list[float]]:
    """Return what _apart returns, from one row for each question, and one pass for all of them.

    Its answers stand one after another, and a mask keeps them from seeing each other, so the prompt's keys are read
    once and not four times.
    """
    tails = [[answer[:-1] for answer in one.answers] for one in batch]
    rows = [[token for tail in question for token in tail] for question in tails]
    filled, longest = cache.get_seq_length(), max(map(len, rows))
    first = next(model.parameters())
    hidden = torch.finfo(first.dtype).min
    mask = torch.full((len(batch), 1, longest, filled + longest), hidden, dtype=first.dtype)
    positions = torch.zeros(len(batch), longest, dtype=torch.long)
    for i, (one, question) in enumerate(zip(batch, tails, strict=True)):
        mask[i, ..., : len(one.context)] = 0
        start = 0
        for tail in question:
            here, end = slice(start, start + len(tail)), start + len(tail)
            positions[i, here] = torch.arange(len(one.context), len(one.context) + len(tail))
            mask[i, 0, here, filled + start : filled + end].triu_(1)  # 0 where an answer sees itself and its past
            start = end
    extra = {"attention_mask": mask.to(first.device), "position_ids": positions.to(first.device)}
    logits, _ = _continue(model, rows, fill, cache, **extra)  # (questions, longest, vocabulary)
    found = []
    for i, one in enumerate(batch):
        logs = iter(logits[i].float().log_softmax(-1))
        found.append([sum(next(logs)[token].item() for token in answer[1:]) for answer in one.answers])
    return found


def _alone(model: torch.nn.Module, one: Encoded, fill: int) -> list[float]:
    """Return the log-likelihoods of one question's answers from whole rows, without a cache."""
    rows = [one.context + answer[:-1] for answer in one.answers]
    start = len(one.context) - 1  # this place predicts the first token of an answer
    logits, _ = _continue(model, rows, fill, None, lambda hidden: hidden[:, start:])  # (4, longest - start, vocabulary)
    logs = logits.float().log_softmax(-1)
    return [_picked(logs[i], answer) for i, answer in enumerate(one.answers)]


def _picked(logs: torch.Tensor, targets: Sequence[int]) -> float:
    """Sum the log-probabilities of `targets` in the first places; logs: (places, vocabulary)."""
    return sum(logs[i, target].item() for i, target in enumerate(targets))  # in float64


def _continue(
    model: torch.nn.Module,
    rows: list[list[int]],
    fill: int,
    cache: "DynamicCache | None",
    places: Callable[[torch.Tensor], torch.Tensor] = lambda hidden: hidden,
    *,
    use_cache: bool = False,
    **extra: torch.Tensor,
) -> "tuple[torch.Tensor, DynamicCache | None]":
    """Read rows after a cache, filled on the right. Returns logits, and the longer cache if there is one.

    places: of the states before the head, (rows, longest, hidden), those that need logits. use_cache: begin a cache.
    A causal model never looks to the right, so what fills the rows changes nothing, and no mask is needed.
    """
    device = next(model.parameters()).device
    ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
    ids = pad_sequence(ids, batch_first=True, padding_value=fill).to(device)  # (rows, longest)
    # A hook, as in train/loss.py: logits of all places would take 0.5 GB for four rows of 700 tokens.
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (places(inputs[0]),))
    try:
        output = model(input_ids=ids, past_key_values=cache, use_cache=use_cache or cache is not None, **extra)
    finally:
        hook.remove()
    return output.logits, output.get("past_key_values")
