"""Count what methods other than LoRA learn, from a model's shape alone.

In: a Shape and a Setup. Out: (elements of a learned tensor, number of tensors of that size).
Not here: LoRA (predict.py), the methods themselves (adapters/).
"""

from qlora_lab.memory.linear_shape import LinearShape
from qlora_lab.memory.setup import Setup
from qlora_lab.memory.shape import Shape
from qlora_lab.memory.sight import HEAD, PROJECTOR

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
    if setup.method == "full":
        return [*(_language_model(shape, setup) if setup.whole else []), *_projector(shape, setup)]
    if setup.method == "houlsby":  # one after attention, one after the feed-forward part
        matrix = setup.size * shape.hidden
        return [(n, 2 * shape.layers) for n in (matrix, setup.size, matrix, shape.hidden)]
    if setup.method == "prompt":
        return [(tokens * shape.hidden, 1)]
    if setup.method == "prefix":
        return _prefix(2 * shape.layers * shape.key_value, shape.key_value, setup)
    return [(linear.out_features, shape.layers) for linear in biased(shape, setup)]


def _language_model(shape: Shape, setup: Setup) -> Sizes:
    """Every tensor of a decoder and its head, which a tied one does not have."""
    matrices = [(linear.numel, shape.layers) for linear in shape.linears]
    biases = [(linear.out_features, shape.layers) for linear in shape.linears if linear.bias]
    stacks = [(shape.experts * matrix.numel, shape.layers) for matrix in shape.expert]
    routers = [(shape.experts * shape.hidden, shape.layers)] * bool(shape.experts)
    gates = [(shape.hidden, shape.layers)] * bool(shape.shared)
    norms = [(shape.hidden, 2 * shape.layers + 1), *((width, shape.layers) for _, width, _ in shape.inner_norms)]
    tables = [(shape.table, 1 + (not shape.tied and setup.learns(HEAD)))]
    return [*matrices, *biases, *stacks, *routers, *gates, *norms, *tables]


def _projector(shape: Shape, setup: Setup) -> Sizes:
    """Two matrices and, mostly, their biases."""
    if shape.sight is None or not setup.learns(PROJECTOR):
        return []
    linears = [linear for linear, _ in shape.sight.projector.linears]
    return [(n, 1) for linear in linears for n in (linear.numel, *[linear.out_features] * linear.bias)]


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
