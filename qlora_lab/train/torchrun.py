"""Read the numbers that torchrun gives to the processes that it starts, in environment variables.

In: WORLD_SIZE, RANK and LOCAL_RANK. Out: whole numbers. An empty variable counts as unset: `WORLD_SIZE= command` in a
shell, and job files whose template was not filled in, mean that there is none.
Not here: joining the processes (distributed.py), which loads torch; the command line needs its rank before that.
"""

import os


def world_size() -> int:
    """Return how many processes there are; 1 without torchrun. Raises ValueError for anything but a whole number."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """Return the number of this process, from 0. Raises ValueError as world_size does."""
    # A RANK alone is a leftover of somebody's shell, and would keep a command from printing anything.
    return _number("RANK", 0) if world_size() > 1 else 0


def local_rank() -> int:
    """Return the number of this process among those of its machine. Raises ValueError where it is not set."""
    return _number("LOCAL_RANK")


def _number(name: str, unset: int | None = None) -> int:
    text = os.environ.get(name)
    if not text and unset is not None:
        return unset
    if not text or not text.isdecimal():
        said = f"{name}={text!r} is not a whole number" if text else f"{name} is not set, but WORLD_SIZE is"
        raise ValueError(f"{said}: start all processes with torchrun, which sets it, or unset WORLD_SIZE for one")
    return int(text)
