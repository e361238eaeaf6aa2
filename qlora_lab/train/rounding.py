"""How far two computations of the same sums may differ through rounding alone."""

import torch
from torch import nn


def tolerance(model: nn.Module, tokens: int = 0) -> float:
    """How far two orders of the same sums may differ in norm, relative to the gradient.

    One rounding changes a value by u / sqrt(3) in the root mean square, where u is half the dtype's eps. It happens
    after each of n modules, forward and backward, in both runs, and adds up as a random walk: sqrt(4 n / 3) u. In
    float32 the sums inside a product are rounded too, once for each of their `hidden` terms, and so is the gradient of
    a weight, which adds up `tokens`; 16-bit types sum in float32.
    """
    dtype = getattr(model, "dtype", torch.float32)
    n = sum(not any(m.children()) and not isinstance(m, nn.Dropout) for m in model.modules())  # that compute
    terms = model.get_input_embeddings().weight.shape[1] if dtype == torch.float32 else 1
    last = tokens if dtype == torch.float32 else 0
    return (4 / 3 * (n * terms + last)) ** 0.5 * torch.finfo(dtype).eps / 2
