"""Patterns of layers, as PEFT's rank_pattern and alpha_pattern have them: the first that matches a layer counts.

In: pattern -> value, and the path of a layer. Out: the value. A pattern is a regular expression for the end of a path,
which begins at a dot, so "q_proj" and "self_attn.q_proj" are patterns too.
Source: PEFT 0.21, get_pattern_key in utils/other.py.
"""

import re
from collections.abc import Mapping
from reprlib import repr as short
from typing import Any

WRAPPER = "_orig_mod."  # of torch.compile, around a model or a layer
# A repeated group, or many repeats or choices in a row, can take very long to match: each choice doubles the ways, and
# each repeat has as many as the path has letters. pattern_of escapes whole paths.
ENDLESS = re.compile(r"(?<!\\)\)[*+{]")
REPEATS = re.compile(r"(?<!\\)[*+{]")
MOST_REPEATS = 3
CHOICES = re.compile(r"(?<!\\)\(|(?<![\\(*+}])\?")  # a group, which may hold alternatives, or an optional part
MOST_CHOICES = 8


def first_match(patterns: Mapping[str, Any], path: str, name: str) -> tuple[str, Any] | None:
    """Return (place, value) of the first pattern that the end of `path` matches, or None. name: of `patterns`.

    Raises ValueError, with the place, for a pattern that is not one.
    """
    for pattern, value in patterns.items():
        place = f"{name}[{short(pattern)}]"
        if not isinstance(pattern, str):
            raise ValueError(f"{place} is not a pattern of layers: give names of layers")
        if _is_endless(pattern):
            raise ValueError(f"{place} can take very long to match: name its layers")
        try:
            if re.match(rf"(.*\.)?({pattern})$", path):
                return place, value
        except (re.error, OverflowError) as error:
            raise ValueError(f"{place} is not a pattern of layers: mend it ({error})") from None
    return None


def pattern_of(path: str) -> str:
    """Return the pattern that matches the layer at `path` and no other."""
    return f"^{re.escape(path)}"


def uncompiled(path: str) -> str:
    """Return a path without what torch.compile adds to it."""
    return path.replace(WRAPPER, "")


def _is_endless(pattern: str) -> bool:
    many = len(REPEATS.findall(pattern)) > MOST_REPEATS or len(CHOICES.findall(pattern)) > MOST_CHOICES
    return many or ENDLESS.search(pattern) is not None
