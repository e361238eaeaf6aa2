"""What a run says when it cannot go on: what happened, what is saved, and what to do next."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from qlora_lab.model.modes import mode
from qlora_lab.model.out_of_memory import telling_memory
from qlora_lab.train.checkpoint import saved_steps
from qlora_lab.train.nonfinite import first_nonfinite
from qlora_lab.train.run_record import computes_in
from qlora_lab.train.settings import Settings


@contextmanager
def explaining_errors(when: str, folder: Path, settings: Settings) -> Iterator[None]:
    """Inside the `with` block an error about full memory or a full disk says what is saved and what to do."""
    try:
        with telling_memory(lambda: f"out of memory {when}: {_less_memory(folder, settings)}"):
            yield
    except OSError as error:
        if error.errno is None:  # raised by this library, with its own advice
            raise
        where = f"{error.filename}: " if error.filename else ""  # a full disk often names no file
        message = f"the run ended {when} ({where}{error.strerror}): {last_saved(folder)}"
        raise OSError(f"{message}. Fix that, then resume (resume=True; --resume on the command line)") from error


def last_saved(folder: Path) -> str:
    """The newest checkpoint of the run in `folder`, in words."""
    steps = saved_steps(folder)
    return f"the last checkpoint is step {steps[-1]} in {folder}" if steps else "there is no checkpoint yet"


def where_not_finite(model: torch.nn.Module, micro_batches: list[dict[str, torch.Tensor]], lr: float) -> str:
    """Where the values of a step stop being finite, and what to change, in words."""
    with mode(model, training=True):
        places = (first_nonfinite(model, batch) for batch in micro_batches)
        place = next((place for place in places if place), None)
    # Dropout draws anew in this second try, and the sum over micro-batches is not tried.
    where = place or "not found again, so it was drawn (dropout) or is in the sum"
    lower = f"lower lr={lr} (--lr)"
    remedy = f"Try to {lower}"
    if computes_in(model) != torch.float32:
        remedy = f"Load the model with dtype=torch.float32 (--dtype float32), or {lower}"
    return f"The first value that is not finite: {where}. {remedy}"


def _less_memory(folder: Path, settings: Settings) -> str:
    steps = saved_steps(folder)
    again = f"resume from step {steps[-1]} in {folder}" if steps else "nothing is saved yet: begin again"
    recompute = "gradient_checkpointing=True (--gradient-checkpointing)"
    smaller = "a lower micro_batch_size (--micro-batch-size) or max_length (--max-length)"
    if settings.gradient_checkpointing:
        return f"{again} where more is free, or begin a new run with {smaller}"
    return f"{again} with {recompute}, or begin a new run with {smaller}"
