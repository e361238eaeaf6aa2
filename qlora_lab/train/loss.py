"""The loss of a language model on the answers of a batch, and on nothing else.

In: a causal model of transformers, and a batch as dataset.collate or batches.collate_rows makes it. Out: the loss, and
the number of tokens. It is a sum of cross entropies in nats, not a mean, so a caller can add up batches and divide
once, by the total number of answer tokens.

Only positions with a label go through the head: one in eleven for a prompt of 150 tokens and an answer of 15. The head
does a fifth of SmolLM2's multiplications and, with a vocabulary of 49,152, takes most of its memory.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from qlora_lab.data.dataset import IGNORED, Encoded, collate, to_device
from qlora_lab.model.modes import measuring

BATCH_SIZE = 8  # examples at once in an evaluation


def answer_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Return (sum of cross entropies, () float32 with its graph; number of labels) of a batch on any device."""
    batch = to_device(batch, model)
    targets = batch["labels"][:, 1:]  # position i predicts token i + 1: (batch, longest - 1)
    learned = targets != IGNORED  # the mask of the loss, (batch, longest - 1): answer tokens
    # A hook, not a call of decoder and head in turn: some models scale or cap their logits after the head.
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
    """Add the gradients of the loss, the mean over the `answer_tokens` of all batches, to `.grad`. Returns the loss.

    Gradients of 16 bits are summed in float32 and rounded once, before the last batch, whose own are then added: two
    roundings, however many batches there are.
    scale: applied to the loss before it is differentiated. around: a context for each forward and backward pass; its
    argument is whether the batch is the last.
    """
    loss = 0.0
    sums: dict[torch.nn.Parameter, torch.Tensor] = {}  # float32, of gradients that are not
    for number, batch in enumerate(batches, 1):
        is_last = number == len(batches)
        if is_last:
            for parameter in list(sums):
                parameter.grad = sums.pop(parameter).to(parameter.dtype)  # no name keeps a sum through the last pass
        with around(is_last):
            part = answer_loss(model, batch)[0] / answer_tokens
            if part.requires_grad:  # false if the loss depends on no trained parameter
                scale(part).backward()  # frees the graph, so one micro-batch is in memory at a time
        if not is_last:
            _sum_in_float32(model, sums)
        loss += part.item()
    return loss


def _sum_in_float32(model: torch.nn.Module, sums: dict[torch.nn.Parameter, torch.Tensor]) -> None:
    """Move gradients of 16 bits, as weights of 16 bits have them, into `sums`."""
    for parameter in model.parameters():
        gradient = parameter.grad
        if gradient is not None and gradient.dtype != torch.float32:
            sums[parameter] = sums[parameter].add_(gradient) if parameter in sums else gradient.float()
            parameter.grad = None


def held_out_loss(model: torch.nn.Module, encoded: list[Encoded], progress: bool = True) -> float:
    """Return the mean cross entropy in nats over all answer tokens. Raises ValueError for an empty list."""
    if not encoded:
        raise ValueError("no held-out examples: the loss needs at least one")
    loss, labels = summed_loss(model, encoded, progress)
    return loss / labels


def summed_loss(model: torch.nn.Module, encoded: list[Encoded], progress: bool = True) -> tuple[float, int]:
    """Return (sum of cross entropies in nats, number of answer tokens) of held-out examples."""
    by_length = sorted(encoded, key=lambda example: len(example.input_ids))  # alike in length: little padding
    parts = [by_length[start : start + BATCH_SIZE] for start in range(0, len(by_length), BATCH_SIZE)]
    batches = (collate(part, pad_id=0) for part in parts)  # one at a time: pictures are large
    losses = batch_losses(model, batches, "held-out loss", progress, len(parts))
    return sum(loss for loss, _ in losses), sum(labels for _, labels in losses)


def batch_losses(
    model: torch.nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    title: str,
    progress: bool = True,
    count: int | None = None,
) -> list[tuple[float, int]]:
    """Return (sum of cross entropies in nats, number of labels) of each batch; `title` labels the progress bar.

    count: of the batches, for the bar, if they are not a list.
    """
    with measuring(model):
        bar = tqdm(batches, title, count, unit="batch", leave=False, disable=not progress)
        return [(loss.item(), labels) for loss, labels in (answer_loss(model, batch) for batch in bar)]
