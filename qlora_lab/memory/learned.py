"""Count what the methods beside LoRA learn, from a model's shape alone.

In: a Shape and a Setup. Out: (elements of a learned tensor, number of tensors of that size).
Not here: LoRA and full fine-tuning (predict.py), the methods themselves (adapters/).
"""

from qlora_lab.memory.setup import Setup
from qlora_lab.memory.shape import LinearShape, Shape

FORMULA = {
    "houlsby": "2 L (2 m d + m + d)",
    "prefix": "p x 2 L kv, or an MLP that gives them",
    "prompt": "p d",
    "bitfit": "out of each layer with a bias",
    "zero_bias": "out of each layer",
}
Sizes = list[tuple[int, int]]


def learned_by_method(shape: Shape, setup: Setup) -> Sizes:
    """Return the sizes of what `setup.method` learns. Raises ValueError for BitFit on a model without biases."""
    tokens = setup.virtual_tokens
    if setup.method == "houlsby":  # one after attention, one after the feed-forward part
        matrix = setup.size * shape.hidden
        return [(n, 2 * shape.layers) for n in (matrix, setup.size, matrix, shape.hidden)]
    if setup.method == "prompt":
        return [(tokens * shape.hidden, 1)]
    if setup.method == "prefix":
        return _prefix(2 * shape.layers * shape.key_value, shape.key_value, setup)
    return [(linear.out_features, shape.layers) for linear in biased(shape, setup)]


def _prefix(wide: int, narrow: int, setup: Setup) -> Sizes:
    """wide: keys and values of all layers, of one token; narrow: keys of one layer."""
    if setup.mlp is None:  # keys and values learn directly
        return [(setup.virtual_tokens * wide, 1)]
    # what goes into the MLP, then its two matrices with their biases
    return [(n, 1) for n in (setup.virtual_tokens * narrow, setup.mlp * narrow, setup.mlp, wide * setup.mlp, wide)]


def biased(shape: Shape, setup: Setup) -> list[LinearShape]:
    """Return the linear layers of one layer whose bias learns: those that have one, or, in zero_bias, all."""
    if setup.method not in ("bitfit", "zero_bias"):
        return []
    chosen = [linear for linear in shape.linears if setup.method == "zero_bias" or linear.bias]
    if not chosen:
        raise ValueError(f"{shape.name} has no biases to train: use zero_bias")
    return chosen
