"""Read what torchrun tells the processes that it starts, in environment variables.

In: WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Out: whole numbers. An empty variable counts as unset:
`WORLD_SIZE= command` in a shell, and job files whose template was not filled in, mean that there is none.
Not here: joining the processes (distributed.py), which loads torch; the command line needs its rank before that.
"""

import os
import re

DIGITS = 9  # more than any number of processes has; Python refuses to read thousands of them
LAST_PORT = 65535
FIX = "start all processes with torchrun, which sets it, or unset WORLD_SIZE for one"


def world_size() -> int:
    """Return how many processes there are; 1 without torchrun. Raises ValueError for anything but a number from 1."""
    size = _number("WORLD_SIZE", 1)
    if size < 1:
        raise ValueError(f"WORLD_SIZE={size} is not allowed, there is at least 1 process: {FIX}")
    return size


def rank() -> int:
    """Return the number of this process, from 0.

    Raises ValueError as world_size does, and with several processes where it is not set or is not one of theirs.
    """
    size = world_size()
    if size == 1:  # a RANK alone is a leftover of somebody's shell, and would keep a command from printing anything
        return 0
    number = _number("RANK")
    if number >= size:  # the others would wait half an hour for one that never comes
        raise ValueError(f"RANK={number} is not allowed, WORLD_SIZE={size} has ranks from 0 to {size - 1}: {FIX}")
    return number


def local_rank() -> int:
    """Return the number of this process among those of its machine. Raises ValueError where it is not set."""
    return _number("LOCAL_RANK")


def check_meeting_point() -> None:
    """Raise ValueError unless MASTER_ADDR and MASTER_PORT say where processes meet: torch would end in a traceback."""
    if not os.environ.get("MASTER_ADDR"):
        raise ValueError(_unset("MASTER_ADDR"))
    if not 1 <= (port := _number("MASTER_PORT")) <= LAST_PORT:  # at 0 each process would be given another
        raise ValueError(f"MASTER_PORT={port} is not allowed, ports are 1 to {LAST_PORT}: {FIX}")


def _number(name: str, unset: int | None = None) -> int:
    text = os.environ.get(name)
    if not text and unset is not None:
        return unset
    if not text:
        raise ValueError(_unset(name))
    if not re.fullmatch(rf"[0-9]{{1,{DIGITS}}}", text):  # str.isdecimal takes digits of any script
        raise ValueError(f"{name}={text[:60]!r} is not a whole number: {FIX}")
    return int(text)


def _unset(name: str) -> str:
    return f"{name} is not set, but WORLD_SIZE is: {FIX}"
