"""The loss of a language model on the answers of a batch, and on nothing else.

In: a causal model of transformers and a batch as data.collate or batches.collate_rows makes it. Out: a summed cross
entropy in nats, and over how many tokens. Summed, not averaged, so that whoever adds up batches divides once, by all
tokens.

Only rows that have a label go through the head: of a prompt of 150 tokens and an answer of 15 that is one in eleven,
and the head holds a fifth of SmolLM2's multiplications and, over a vocabulary of 49,152, most of its memory.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from qlora_lab.data.dataset import IGNORED, Encoded, collate, to_device
from qlora_lab.model.modes import measuring

BATCH_SIZE = 8  # of an evaluation


def answer_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """(sum of cross entropies, () float32 with its graph; number of labels) of a batch on any device."""
    batch = to_device(batch, model)
    targets = batch["labels"][:, 1:]  # position i predicts token i + 1: (batch, longest - 1)
    learned = targets != IGNORED
    # A hook and not a call of the decoder and the head in turn: some models scale or cap their logits after the head.
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :-1][learned],))
    try:
        output = model(**{name: batch[name] for name in batch if name != "labels"}, use_cache=False)
    finally:
        hook.remove()
    logits = output.logits.float()  # (n_learned, vocabulary)
    return cross_entropy(logits, targets[learned], reduction="sum"), int(learned.sum())


def accumulate(
    model: torch.nn.Module,
    batches: list[dict[str, torch.Tensor]],
    answer_tokens: int,
    scale: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss,
    around: Callable[[bool], AbstractContextManager] = lambda last: nullcontext(),
) -> float:
    """Add the gradients of the mean loss over `answer_tokens`, those of all batches, to `.grad`. Returns that loss.

    scale: of what is differentiated. around: what each forward and backward runs in, given whether it is the last.
    """
    loss = 0.0
    for number, batch in enumerate(batches, 1):
        with around(number == len(batches)):
            part = answer_loss(model, batch)[0] / answer_tokens
            if part.requires_grad:  # else nothing that is trained was reached, and nothing gets a gradient
                scale(part).backward()
        loss += part.item()
    return loss


def held_out_loss(model: torch.nn.Module, encoded: list[Encoded], progress: bool = True) -> float:
    """Mean cross entropy in nats over all answer tokens of all examples, each token counting once.

    Raises ValueError for an empty list.
    """
    if not encoded:
        raise ValueError("no held-out examples: the loss needs at least one")
    loss, labels = summed_loss(model, encoded, progress)
    return loss / labels


def summed_loss(model: torch.nn.Module, encoded: list[Encoded], progress: bool = True) -> tuple[float, int]:
    """(sum of cross entropies in nats, number of answer tokens) of held-out examples."""
    by_length = sorted(encoded, key=lambda one: len(one.input_ids))  # little padding; a sum does not mind the order
    parts = [by_length[start : start + BATCH_SIZE] for start in range(0, len(by_length), BATCH_SIZE)]
    losses = batch_losses(model, [collate(part, pad_id=0) for part in parts], "held-out loss", progress)
    return sum(loss for loss, _ in losses), sum(labels for _, labels in losses)


def batch_losses(
    model: torch.nn.Module, batches: list[dict[str, torch.Tensor]], title: str, progress: bool = True
) -> list[tuple[float, int]]:
    """(sum of cross entropies in nats, number of labels) of each batch; `title` stands before the progress bar."""
    with measuring(model):
        bar = tqdm(batches, title, unit="batch", leave=False, disable=not progress)
        return [(loss.item(), labels) for loss, labels in (answer_loss(model, batch) for batch in bar)]
