"""What a run is asked to do, and the learning rate that follows from it.

In: numbers and names of the user's. Out: one frozen Settings; every field decides the result but those in FREE.
Source: QLoRA section 4 and appendix B for rate, clipping and schedule.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import repr as short

from qlora_lab.data.examples import Example
from qlora_lab.quant.numbers import MOST, MOST_BYTES, check_number, check_seed, check_whole

SCHEDULES = ("constant", "cosine")
# May differ when a run is resumed: they change no bit of it. notes: of the data, whose checksum is compared; arithmetic
# is compared by itself (identity.py).
FREE = ("save_every", "keep", "optimizer_budget", "gradient_checkpointing", "notes", "arithmetic")


@dataclass(frozen=True)
class Settings:
    """What a run is asked to do; each default with its reason. Raises ValueError for a value that is not allowed."""

    steps: int = 60  # four to seven minutes for SmolLM2-135M on two cores
    batch_size: int = 8  # examples a step, however they are cut into rows and shared by processes
    micro_batch_size: int | None = None  # rows at once; fewer need less memory for the same step. None: all
    lr: float = 2e-4  # the paper's, for 7B and 13B
    schedule: str = "constant"  # the paper's; cosine falls to 0 at the last step
    warmup_steps: int = 0  # in which the rate rises from lr / (warmup_steps + 1) to lr
    clip: float = 0.3  # the paper's largest gradient norm
    max_length: int = 256  # tokens; longer examples are left out, and counted: memory follows the longest
    packing: bool = False  # several examples in one row of max_length tokens: less padding, the same loss; the model
    #                        is asked first whether it keeps them apart (packed_rows.py)
    group_by_length: bool = False  # batches of examples that are alike in length: less padding, other batches
    gradient_checkpointing: bool = False  # keep one activation a layer and compute the others again: less memory
    shard: bool = False  # base weights spread over the processes, not whole on each: less memory, more traffic
    optimizer_bits: int = 32  # of each moment of AdamW; 8: a quarter of the memory
    optimizer_budget: int | None = None  # bytes of the optimizer's state in memory, the rest is paged; a checkpoint
    #                                      takes all of it into memory for a moment. None: all, always
    eval_every: int = 0  # steps between evaluations on held-out examples. 0: none
    patience: int = 0  # evaluations in a row without a new best after which a run stops. 0: it never does
    save_every: int = 50  # steps between checkpoints. 0: only when interrupted
    keep: int = 2  # checkpoints, the newest; two, so that one is left should the other be damaged
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "max_length", "keep"):
            check_whole(name, getattr(self, name))
        for name in ("warmup_steps", "eval_every", "patience", "save_every"):
            check_whole(name, getattr(self, name), 0)
        for name, most in (("micro_batch_size", MOST), ("optimizer_budget", MOST_BYTES)):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1, most)
        check_seed(self.seed)
        check_number("lr", self.lr, lambda lr: 0 < lr <= 1e6, "a number above 0, usually below 0.001")
        check_number("clip", self.clip, lambda clip: clip > 0, "a number above 0")
        for name in ("packing", "group_by_length", "gradient_checkpointing", "shard"):
            if not isinstance(getattr(self, name), bool):  # "no" would count as true
                raise ValueError(f"{name}={short(getattr(self, name))} is not allowed: it is True or False")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={short(self.schedule)} is not known: choose {' or '.join(SCHEDULES)}")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} leaves no step of {self.steps} at the full rate")
        if self.optimizer_bits not in (32, 8):
            raise ValueError(f"optimizer_bits={short(self.optimizer_bits)} is not allowed: moments have 32 or 8")
        if self.patience and not self.eval_every:
            raise ValueError(f"patience={self.patience} needs evaluations: set eval_every as well")
        if self.packing and self.group_by_length:
            raise ValueError("packing and group_by_length both save padding, and exclude each other: choose one")


def check_held_out(settings: Settings, examples: Sequence[Example]) -> None:
    """Raise ValueError if evaluations are asked for and there is nothing to evaluate on."""
    if settings.eval_every and not examples:
        raise ValueError(f"eval_every={settings.eval_every} needs held-out examples: there are none")


def learning_rate(settings: Settings, step: int) -> float:
    """The rate of a step, which counts from 1.

    >>> cosine = Settings(steps=9, lr=1.0, schedule="cosine", warmup_steps=1)
    >>> [round(learning_rate(cosine, step), 2) for step in (1, 2, 6, 9)]
    [0.5, 1.0, 0.5, 0.04]
    """
    warmup = settings.warmup_steps
    if step <= warmup:
        return settings.lr * step / (warmup + 1)
    if settings.schedule == "constant":
        return settings.lr
    done = (step - warmup - 1) / (settings.steps - warmup)  # from 0 to just below 1: the last step still learns
    return settings.lr * (1 + math.cos(math.pi * done)) / 2
