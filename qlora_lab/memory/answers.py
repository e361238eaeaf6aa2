"""Predict an answer from a model's configuration alone: the bytes of its cache, and what limits the speed of a token.

In: what shape_of takes, the number of texts, and their tokens. Out: bytes to the byte (predict_cache), and the least
time of a step on a machine of two rates (step_work). A step gives each text one token: it reads the weights once,
whatever the number of texts, but each text has its own keys and values, and its own products.
Source: infer/cache.py; the roofline of Williams, Waterman and Patterson (CACM 52(4), 2009): a machine that moves bytes
while it computes is busy for the longer of the two times.

Not here: measured times (bench/decode.py).
"""

from dataclasses import dataclass
from typing import Any

from qlora_lab.infer.stack import FAMILIES
from qlora_lab.memory.shape import Shape, shape_of
from qlora_lab.quant.numbers import check_whole

FLOAT32 = 4  # bytes
CACHES = {32: (4, 0), 8: (1, 4)}  # bits of a cache -> bytes of a number, and of a head's constant
HEAD_BITS = 16  # the head stays as it was loaded


def predict_cache(model: Any, rows: int = 1, capacity: int = 2048, bits: int = 32) -> int:
    """Return the bytes of keys, values, cosines and sines for `rows` texts of at most `capacity` tokens.

    capacity: tokens of the longest prompt and its answer, less the answer's last, which the model never reads.
    bits: 32 or 8, of a key's and a value's numbers; in 8, each head's has a constant.
    Raises what shape_of raises, and ValueError for other bits and for a family that is left to transformers' generate,
    whose cache grows and has another dtype.

    >>> predict_cache("llama-7b", 1, 2048), predict_cache("llama-7b", 1, 2048, bits=8)
    (2149580800, 555745280)
    """
    check_whole("rows", rows)
    check_whole("capacity", capacity)
    if bits not in CACHES:
        raise ValueError(f"bits={bits!r} is not allowed: a cache has {' or '.join(map(str, CACHES))}")
    shape = _decoded(model)
    kept = rows * capacity * _kept_by_token(shape, bits)  # rows share no prefix: each has its own
    angles = 2 * capacity * shape.head_dim  # one table for all layers and rows
    return kept + FLOAT32 * angles


@dataclass(frozen=True)
class Machine:
    """Two rates of a machine: what it moves from memory, and what it computes."""

    bytes_per_second: float
    operations_per_second: float  # a multiplication and an addition are two


@dataclass(frozen=True)
class StepWork:
    """What a step moves and computes: something once, and something for each text."""

    weight_bytes: float
    text_bytes: int  # keys and values of one text
    operations: int  # for one text

    def seconds(self, machine: Machine, rows: int) -> tuple[float, float]:
        """Return the least seconds of moving and of computing for `rows` texts; a step takes at least the longer."""
        moved = self.weight_bytes + rows * self.text_bytes
        return moved / machine.bytes_per_second, rows * self.operations / machine.operations_per_second

    def ridge(self, machine: Machine) -> float | None:
        """Return the number of texts at which both take equally long, or None if moving always takes longer.

        None means that one text's keys and values take longer to read than its products take to compute.
        """
        # each text adds computing and moving; the weights are a start that computing has to catch up with
        slope = self.operations / machine.operations_per_second - self.text_bytes / machine.bytes_per_second
        return self.weight_bytes / machine.bytes_per_second / slope if slope > 0 else None


def step_work(model: Any, context: int, bits: float) -> StepWork:
    """Return the work of a step after `context` tokens, with `bits` per weight of the layers, constants included.

    Raises as predict_cache, and ValueError for a context below 1 or for bits that are not above 0 and at most 32.

    >>> step_work("llama-7b", 512, 16).weight_bytes
    13214154752.0
    """
    check_whole("context", context)
    if not 0 < bits <= 32:
        raise ValueError(f"bits={bits} is not allowed: it is above 0 and at most 32")
    shape = _decoded(model)
    # biases and norms are left out: less than a thousandth of the weights
    layers = shape.layers * sum(linear.numel for linear in shape.linears)
    # each query is multiplied by a key, and the result by a value; softmax, norms and gates are below a hundredth
    attention = 4 * shape.layers * shape.query * context
    return StepWork(
        weight_bytes=(layers * bits + shape.table * HEAD_BITS) / 8,
        text_bytes=context * _kept_by_token(shape),
        operations=2 * (layers + shape.table) + attention,
    )


def _kept_by_token(shape: Shape, bits: int = 32) -> int:
    """Bytes of the keys and values of one token in all layers."""
    number, constant = CACHES[bits]
    return 2 * shape.layers * (number * shape.key_value + constant * shape.key_value_heads)


def _decoded(model: Any) -> Shape:
    shape = shape_of(model)
    if shape.family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(
            f"{shape.name} is of the family {shape.family}, whose cache transformers makes: choose {known}"
        )
    return shape
