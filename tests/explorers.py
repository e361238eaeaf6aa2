"""The explorers of the course, for tests that must leave none out."""

import importlib
from pathlib import Path

from qlora_lab import show
from qlora_lab.show.explorer import Explorer


def explorers() -> set[type[Explorer]]:
    """Every explorer of the library, whichever module it is in; those that tests make are no part of it."""
    for file in Path(show.__file__).parent.glob("*.py"):
        importlib.import_module(f"qlora_lab.show.{file.stem}")
    return {made for made in Explorer.__subclasses__() if made.__module__.startswith("qlora_lab.")}
