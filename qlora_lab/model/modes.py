"""Training mode, evaluation mode or gradient checkpointing inside a `with` block; afterwards all is as before.

`model.eval()` followed by `model.train()` does not do that: it also switches on parts that were off before.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

FUNCTION = "_gradient_checkpointing_func"  # what transformers' layers call


@contextmanager
def mode(model: torch.nn.Module, *, training: bool) -> Iterator[None]:
    """Put all of `model` into training mode, or into evaluation mode, inside the `with` block."""
    flags = [(module, module.training) for module in model.modules()]  # each module's own: parts may differ
    model.train(training)  # all parts alike
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def measuring(model: torch.nn.Module) -> Iterator[None]:
    """Use evaluation mode without gradients; afterwards each module has its own training flag again."""
    # no_grad, not inference_mode: a buffer that is first made there could never take part in a backward pass.
    with mode(model, training=False), torch.no_grad():
        yield


@contextmanager
def checkpointing(model: torch.nn.Module) -> Iterator[None]:
    """Checkpoint gradients: each layer keeps only its input and is computed again in backward.

    Non-reentrant, which needs no input with a gradient: else adapters after frozen embeddings would not learn. It sets
    the flags that transformers' layers read, because transformers' own methods leave a hook on the embedding behind,
    after which the first layer keeps more for its backward pass.
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
    """Keep random draws inside the `with` block, on the CPU or the model's device, from changing those after it."""
    device = next(model.parameters()).device  # all of a model is on one device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
