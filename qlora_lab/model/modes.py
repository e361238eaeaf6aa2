"""Training mode, evaluation mode or gradient checkpointing for a while; afterwards all is as it was.

`model.eval()` followed by `model.train()` is not that: it also switches on the parts that were off before.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

FUNCTION = "_gradient_checkpointing_func"  # what transformers' layers call


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
    """Gradient checkpointing: each layer keeps its input only and is computed again in backward. Then the model's own.

    Non-reentrant, which needs no input with a gradient: frozen embeddings starve no adapter. By the flags that layers
    of transformers read, because switching it on and off by its methods leaves a hook on the embedding behind, after
    which the first layer keeps more for its backward pass.
    Raises ValueError for a model without such layers.
    """
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer that transformers can checkpoint")
    own = [(layer, layer.gradient_checkpointing, getattr(layer, FUNCTION, None)) for layer in layers]
    for layer in layers:
        layer.gradient_checkpointing = True
        setattr(layer, FUNCTION, partial(checkpoint, use_reentrant=False))
    try:
        yield
    finally:
        for layer, flag, function in own:
            layer.gradient_checkpointing = flag
            setattr(layer, FUNCTION, function)


@contextmanager
def own_draws(model: torch.nn.Module) -> Iterator[None]:
    """What is drawn inside the `with` block, on the CPU or the model's device, changes nothing after it."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
