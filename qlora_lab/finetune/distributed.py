"""Who computes what in a run: one process, for now."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch


class OneProcess:
    """A run in one process. model: what is called for a loss; rank: of this process, of `size`."""

    rank, size = 0, 1

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def gradients(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of a micro-batch; with `last`, gradients are complete after `finish`."""
        return nullcontext()

    def finish(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Make gradients of this process's rows those of all rows."""

    def sum(self, *numbers: float) -> tuple[float, ...]:
        """Each number summed over all processes."""
        return numbers

    def wait(self) -> None:
        """Until all processes are here."""
