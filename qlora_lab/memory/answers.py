"""Predict the cache of an answer from a model's configuration alone: what infer/cache.py will take, to the byte.

In: what shape_of takes, the number of texts, and the most tokens of a row. Out: bytes. Source: infer/cache.py.
"""

from typing import Any

from qlora_lab.infer.stack import FAMILIES
from qlora_lab.memory.shape import shape_of
from qlora_lab.quant.numbers import check_whole

FLOAT32 = 4


def predict_cache(model: Any, rows: int = 1, capacity: int = 2048) -> int:
    """Return the bytes of keys, values, cosines and sines for `rows` texts of at most `capacity` tokens.

    capacity: tokens of the longest prompt and its answer, but for the answer's last, which the model never reads.
    Raises whatever shape_of raises, and ValueError for a family that transformers' generate answers for, whose cache
    grows and has another dtype.

    >>> predict_cache("llama-7b", 1, 2048)
    2149580800
    """
    check_whole("rows", rows)
    check_whole("capacity", capacity)
    shape = shape_of(model)
    if shape.family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(
            f"{shape.name} is of the family {shape.family}, whose cache transformers makes: choose {known}"
        )
    kept = 2 * shape.layers * rows * shape.key_value * capacity  # the rows share no prefix: each has its own
    angles = 2 * capacity * shape.head_dim  # one table for all layers and rows
    return FLOAT32 * (kept + angles)
