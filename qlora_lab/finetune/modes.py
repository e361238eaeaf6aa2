"""Training or evaluation mode for a while; afterwards each module has its own flag again.

`model.eval()` followed by `model.train()` is not that: it also switches on the parts that were off before.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def mode(model: torch.nn.Module, *, training: bool) -> Iterator[None]:
    """All of `model` in training mode, or in evaluation mode, inside the `with` block."""
    flags = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def measuring(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module has its own training flag again."""
    # no_grad and not inference_mode: a buffer first made there could never serve a backward pass
    with mode(model, training=False), torch.no_grad():
        yield
