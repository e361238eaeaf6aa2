"""Which examples make a step, and in which rows they lie.

    Batches -> [example numbers] -> to_rows -> [[Encoded, ...], ...] -> collate_rows -> batch

In: encoded examples. Out: input_ids, labels and position_ids or attention_mask, each (rows, longest) int64.
Source: reports of users of other trainers: batches sorted by length give the loss curve a sawtooth shape, and examples
packed into one row without a mask attend to their neighbours.

How examples are laid out in rows does not change a step's loss, the mean over its answer tokens. Which examples make a
step does.
"""

import numpy as np
import torch

from qlora_lab.data.dataset import IGNORED, Encoded, collate

POOL = 50  # batches sorted by length together: enough for alike lengths, few enough to remain a shuffle


class Batches:
    """Endless lists of example numbers: a new shuffle of all examples in each epoch, whose last batch may be smaller.

    The order depends on (seed, epoch) alone, so a few numbers are the whole state, and a resumed run sees the examples
    that an uninterrupted run would. lengths: tokens of each example; with them the examples of a batch are alike in
    length, while short and long batches still come in random order.
    """

    def __init__(self, size: int, batch_size: int, seed: int, lengths: list[int] | None = None) -> None:
        if size < 1 or batch_size < 1:
            raise ValueError(f"{size} examples in batches of {batch_size}: give at least 1 of each")
        if lengths is not None and len(lengths) != size:
            raise ValueError(f"{len(lengths)} lengths for {size} examples: give one for each")
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.lengths = lengths
        self.epoch = 0
        self.position = 0  # examples of this epoch already handed out
        self._order = self._sorted = None  # an order of examples, and the (seed, epoch) it belongs to

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> list[int]:
        if self.position >= self.size:
            self.epoch += 1
            self.position = 0
        if self._sorted != (self.seed, self.epoch):  # once an epoch: a million examples take a third of a second
            self._order = self._shuffled()
            self._sorted = (self.seed, self.epoch)
        batch = self._order[self.position : self.position + self.batch_size]
        self.position += len(batch)
        return batch.tolist()

    def _shuffled(self) -> np.ndarray:
        """Return all example numbers in this epoch's order, (size,)."""
        generator = np.random.default_rng([self.seed, self.epoch])  # no state besides these two numbers
        order = generator.permutation(self.size)
        if self.lengths is None:
            return order
        # Sort by length inside pools of some batches, not over the whole epoch: alike in a batch, varied across it.
        pool = POOL * self.batch_size  # examples
        lengths = np.asarray(self.lengths)
        pools = [order[start : start + pool] for start in range(0, self.size, pool)]
        alike = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in pools])  # longest first
        batches = [alike[start : start + self.batch_size] for start in range(0, self.size, self.batch_size)]
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []  # the smaller batch stays last
        return np.concatenate([batches[i] for i in generator.permutation(len(batches))] + last)

    def state(self) -> dict[str, int]:
        """Return all that decides what comes next, as plain numbers for a checkpoint."""
        return {name: getattr(self, name) for name in ("size", "batch_size", "seed", "epoch", "position")}

    def restore(self, state: dict[str, int]) -> None:
        """Continue where state() was taken. Raises ValueError for another data set or batch size."""
        for name in ("size", "batch_size"):
            if state[name] != getattr(self, name):
                message = f"saved with {name}={state[name]}, resumed with {name}={getattr(self, name)}"
                raise ValueError(f"{message}: resume with the same data and batch size, or start a new run")
        self.seed = state["seed"]
        self.epoch = state["epoch"]
        self.position = state["position"]


def to_rows(examples: list[Encoded], capacity: int | None = None) -> list[list[Encoded]]:
    """Give each example a row; with a capacity in tokens, pack them into few rows: first fit, longest first."""
    if capacity is None:
        return [[example] for example in examples]
    rows: list[list[Encoded]] = []
    free: list[int] = []  # tokens that still fit into each row
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
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
    """Make a batch of rows. If any holds several examples, position_ids replace the attention_mask.

    Each example of a row counts its positions from 0, and in transformers a token then sees its own example alone.
    All padding has position 0, so each padding token counts as an example of its own.
    """
    if all(len(row) == 1 for row in rows):
        return collate([row[0] for row in rows], pad_id)
    batch = collate([_joined(row) for row in rows], pad_id)  # each (rows, longest)
    positions = torch.zeros_like(batch["input_ids"])
    for number, row in enumerate(rows):
        own = torch.cat([torch.arange(len(example.input_ids)) for example in row])  # 0, 1, 2, 0, 1, ...
        positions[number, : len(own)] = own
    del batch["attention_mask"]  # with one, transformers would ignore where positions start anew
    return batch | {"position_ids": positions}


def _joined(row: list[Encoded]) -> Encoded:
    """Join a row into one. An example's first token is not learned: only its neighbour in the row could predict it."""
    ids = [token for example in row for token in example.input_ids]
    return Encoded(ids, [label for example in row for label in (IGNORED, *example.labels[1:])])
