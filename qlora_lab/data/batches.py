"""Which examples make a step, and in which rows they lie.

    Batches -> [example numbers] -> to_rows -> [[Encoded, ...], ...] -> collate_rows -> batch

In: encoded examples. Out: batches of input_ids, labels and position_ids or attention_mask, each (rows, longest) int64.
Source: what users of other trainers met: batches in the order of length turn the loss curve into a saw, and examples
that are packed into one row without a mask attend to their neighbours.

Nothing here changes the loss of a step: it is a sum over answer tokens, wherever they lie.
Not here: tokens (encode.py), the loss (loss.py).
"""

import numpy as np
import torch

from qlora_lab.data.dataset import IGNORED, Encoded, collate

POOL = 50  # batches that are sorted by length together: enough to be alike, few enough to stay a shuffle


class Batches:
    """Endless lists of example numbers: each epoch a new shuffle of all examples, its last batch may be smaller.

    The order follows from (seed, epoch) alone, so a few numbers are the whole state and a resumed run sees the very
    examples that the interrupted one would have seen. lengths: in tokens, one an example; then the examples of a batch
    are alike in length, while short and long batches still come in no order.

    >>> batches = Batches(5, batch_size=2, seed=0)
    >>> sorted(next(batches) + next(batches) + next(batches))
    [0, 1, 2, 3, 4]
    """

    def __init__(self, size: int, batch_size: int, seed: int, lengths: list[int] | None = None) -> None:
        if size < 1 or batch_size < 1:
            raise ValueError(f"{size} examples in batches of {batch_size}: both must be at least 1")
        if lengths is not None and len(lengths) != size:
            raise ValueError(f"{len(lengths)} lengths for {size} examples: one each is needed")
        self.size, self.batch_size, self.seed, self.lengths = size, batch_size, seed, lengths
        self.epoch, self.position = 0, 0  # position: examples of this epoch already handed out
        self._order = self._sorted = None  # example numbers, and the (seed, epoch) that they are the order of

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> list[int]:
        if self.position >= self.size:
            self.epoch, self.position = self.epoch + 1, 0
        if self._sorted != (self.seed, self.epoch):  # a million examples take a third of a second
            self._order, self._sorted = self._shuffled(), (self.seed, self.epoch)
        batch = self._order[self.position : self.position + self.batch_size]
        self.position += len(batch)
        return batch.tolist()

    def _shuffled(self) -> np.ndarray:
        """All example numbers in this epoch's order, (size,)."""
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(self.size)
        if self.lengths is None:
            return order
        pool, lengths = POOL * self.batch_size, np.asarray(self.lengths)
        pools = [order[start : start + pool] for start in range(0, self.size, pool)]
        alike = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in pools])
        batches = [alike[start : start + self.batch_size] for start in range(0, self.size, self.batch_size)]
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []  # a smaller one stays where it ends
        return np.concatenate([batches[i] for i in generator.permutation(len(batches))] + last)

    def state(self) -> dict[str, int]:
        """Everything that decides what comes next, as plain numbers for a checkpoint."""
        return {name: getattr(self, name) for name in ("size", "batch_size", "seed", "epoch", "position")}

    def restore(self, state: dict[str, int]) -> None:
        """Go on where state() was taken. Raises ValueError if that was another data set or batch size."""
        for name in ("size", "batch_size"):
            if state[name] != getattr(self, name):
                message = f"saved with {name}={state[name]}, resumed with {name}={getattr(self, name)}"
                raise ValueError(f"{message}: resume with the same data and batch size, or start a new run")
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]


def to_rows(examples: list[Encoded], capacity: int | None = None) -> list[list[Encoded]]:
    """One row an example; with a capacity in tokens as few rows as first-fit finds, longest examples first."""
    if capacity is None:
        return [[example] for example in examples]
    rows, free = [], []
    for example in sorted(examples, key=lambda one: -len(one.input_ids)):
        length = len(example.input_ids)
        fitting = next((i for i, space in enumerate(free) if space >= length), None)
        if fitting is None:
            rows.append([example])
            free.append(capacity - length)
        else:
            rows[fitting].append(example)
            free[fitting] -= length
    return rows


def collate_rows(rows: list[list[Encoded]], pad_id: int) -> dict[str, torch.Tensor]:
    """Rows of one or more examples -> a batch. With more, position_ids stand in for the attention_mask.

    Each example of a row counts its positions from 0, and transformers lets no token see beyond the start of its own
    example. Padding does not count on: every position of it is 0, an example of one token.
    """
    if all(len(row) == 1 for row in rows):
        return collate([row[0] for row in rows], pad_id)
    batch = collate([_joined(row) for row in rows], pad_id)
    positions = torch.zeros_like(batch["input_ids"])
    for number, row in enumerate(rows):
        counted = torch.cat([torch.arange(len(one.input_ids)) for one in row])
        positions[number, : len(counted)] = counted
    del batch["attention_mask"]
    return batch | {"position_ids": positions}


def _joined(row: list[Encoded]) -> Encoded:
    """A row as one. The first token of an example is no label: only its neighbour in the row could predict it."""
    ids = [token for one in row for token in one.input_ids]
    return Encoded(ids, [label for one in row for label in (IGNORED, *one.labels[1:])])
