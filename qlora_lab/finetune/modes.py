"""Training mode, evaluation mode or gradient checkpointing for a while; afterwards all is as it was.

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


@contextmanager
def checkpointing(model: torch.nn.Module) -> Iterator[None]:
    """Gradient checkpointing for a while: each layer keeps its input only, and is computed again in backward.

    Non-reentrant, which needs no input with a gradient: frozen embeddings starve no adapter.
    """
    new = hasattr(model, "activation_checkpointing_enable")  # its name since transformers 5.2x; the older one warns
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    getattr(model, f"{name}_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{name}_disable")()
