"""Define the settings of a run, and the learning rate that follows from them.

Every field affects the result except those in FREE.
Source: QLoRA section 4 and appendix B for rate, clipping and schedule.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import repr as short

from qlora_lab.data.examples import Example
from qlora_lab.quant.numbers import MOST, MOST_BYTES, check_number, check_seed, check_whole
from qlora_lab.train.run_options import documented, option

SCHEDULES = ("constant", "cosine")
# These may differ when a run is resumed, because they change no bit of it. notes: describe the data, whose checksum is
# compared; arithmetic is compared on its own (identity.py).
FREE = ("save_every", "keep", "optimizer_budget", "gradient_checkpointing", "notes", "arithmetic")


@documented
@dataclass(frozen=True)
class Settings:
    """The settings of a run. Raises ValueError for a value that is not allowed."""

    steps: int = option(60, "optimizer steps", "steps")  # four to seven minutes for SmolLM2-135M on two cores
    # however they are cut into rows and shared by processes
    batch_size: int = option(8, "examples per step", "examples")
    micro_batch_size: int | None = option(
        None, "rows computed at once; fewer need less memory for the same step (default: all)", "rows"
    )
    lr: float = option(2e-4, "learning rate of AdamW")  # the paper's, for 7B and 13B
    lora_plus: float = option(1, "LoRA+: the learning rate of lora_B as a multiple of lr, usually 16; 1: the same")
    # constant is the paper's; cosine falls towards 0
    schedule: str = option("constant", "schedule of the learning rate: constant or cosine")
    warmup_steps: int = option(0, "steps of linear warm-up", "steps")  # from lr / (warmup_steps + 1) to lr
    clip: float = option(0.3, "largest gradient norm; longer gradients are scaled down")  # the paper's
    # memory follows the longest example, so there is a limit; those left out are counted
    max_length: int = option(256, "tokens per row; longer examples are left out", "tokens")
    # for templates that rewrite earlier answers, so that the model would never write them so
    last_answer_only: bool = option(False, "learn the last answer of each example only; show the others")
    # The model is asked first whether it keeps the examples apart (packed_rows.py).
    packing: bool = option(False, "put several examples into each row: less padding, the same loss")
    group_by_length: bool = option(False, "batch examples of similar length: less padding, but different batches")
    # one activation per layer is kept; the price is one more forward pass
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    # each process keeps a part of the base weights: more traffic
    shard: bool = option(False, "under torchrun, spread the base weights over all processes to save memory")
    # each token is sent to the processes of its experts: more traffic, and each waits for all
    expert_parallel: bool = option(
        False, "under torchrun, spread the experts of each layer over all processes to save memory"
    )
    # with 8 bits, a quarter of the memory
    optimizer_bits: int = option(32, "bits of each of AdamW's two moments: 32 or 8", "bits")
    # A checkpoint takes the whole state into memory for a moment.
    optimizer_budget: int | None = option(
        None, "AdamW state kept in memory, such as 64MiB; the rest is paged out (default: all of it)", "bytes"
    )
    eval_every: int = option(0, "evaluate on held-out examples every N steps; 0: never")
    patience: int = option(0, "stop after N evaluations without improvement; 0: never")
    save_every: int = option(50, "save a checkpoint every N steps; 0: only when interrupted")
    # two, so that one is left if the other is damaged
    keep: int = option(2, "number of checkpoints to keep")
    seed: int = option(0, "seed of the order of the data and of dropout; on the command line also of the adapters")

    def __post_init__(self):
        for name in ("steps", "batch_size", "max_length", "keep"):
            check_whole(name, getattr(self, name))
        for name in ("warmup_steps", "eval_every", "patience", "save_every"):
            check_whole(name, getattr(self, name), 0)
        for name, most in (("micro_batch_size", MOST), ("optimizer_budget", MOST_BYTES)):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1, most)
        check_seed(self.seed)
        check_number("lr", self.lr, lambda lr: 0 < lr <= 1e6, "a number above 0 and at most 1,000,000, usually 2e-4")
        check_number("lora_plus", self.lora_plus, lambda ratio: 0 < ratio <= 1e3, "a number above 0 and at most 1,000")
        check_number("clip", self.clip, lambda clip: clip > 0, "a number above 0")
        switches = ("last_answer_only", "packing", "group_by_length", "gradient_checkpointing")
        for name in (*switches, "shard", "expert_parallel"):
            if not isinstance(getattr(self, name), bool):  # "no" would count as true
                raise ValueError(f"{name}={short(getattr(self, name))} is not allowed: choose True or False")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={short(self.schedule)} is not known: choose {' or '.join(SCHEDULES)}")
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} leaves none of the {self.steps} steps at the full rate: "
                "lower warmup_steps"
            )
        if self.optimizer_bits not in (32, 8):
            raise ValueError(f"optimizer_bits={short(self.optimizer_bits)} is not allowed: moments have 32 or 8 bits")
        if self.patience and not self.eval_every:
            raise ValueError(f"patience={self.patience} needs evaluations: set eval_every as well")
        if self.shard and self.expert_parallel:
            raise ValueError("shard and expert_parallel exclude each other, because both spread the base: choose one")
        if self.packing and self.group_by_length:
            raise ValueError("packing and group_by_length exclude each other, because both save padding: choose one")


def check_held_out(settings: Settings, examples: Sequence[Example]) -> None:
    """Raise ValueError for evaluations without held-out examples, or held-out examples without evaluations."""
    if settings.eval_every and not examples:
        raise ValueError(f"eval_every={settings.eval_every} needs held-out examples: there are none")
    if examples and not settings.eval_every:
        count = f"held_out has {len(examples)} example{'s' * (len(examples) > 1)}"
        raise ValueError(f"{count}, but eval_every=0 evaluates none: set eval_every as well, or leave held_out out")


def learning_rate(settings: Settings, step: int) -> float:
    """Return the learning rate of a step; the first step is 1.

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
