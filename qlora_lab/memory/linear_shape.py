"""The shape of one linear layer, and what is read from a configuration: sizes, and configurations of parts."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class LinearShape(NamedTuple):
    """One linear layer, its weight (out_features, in_features)."""

    name: str  # the last part of its path
    out_features: int
    in_features: int
    bias: bool

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features


def size_of(config: dict, name: str, where: str) -> int:
    """Return a size. Raises ValueError for one that is missing or not a whole number above 0."""
    if name not in config:
        raise ValueError(f"{where} has no {name!r}: add it, for every size depends on it")
    value = config[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:  # True is an int in Python
        raise ValueError(f"{where} has {name}={value!r}: it is a whole number of at least 1")
    return value


def part_of(config: dict, name: str, where: str) -> dict[str, Any]:
    """Return the configuration of a part, {} for none. Raises ValueError for anything else."""
    part = config.get(name) or {}
    if not isinstance(part, Mapping):
        raise ValueError(f"{where} has {name}={part!r:.60}: it is a configuration of its own")
    return dict(part)
