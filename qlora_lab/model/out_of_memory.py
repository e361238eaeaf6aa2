"""Memory that ran out is one error with a sentence: what needed it, and what would need less.

In: whatever torch, numpy, numba, safetensors or the system raise for it. Out: one type, to catch and to tell.
Not here: how much is free (free_memory.py), how much a run needs (memory/predict.py).
"""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SAID = re.compile(
    r"not enough memory|can(no|')t allocate memory|out of memory|bad_alloc|failed to map segment|unable to mmap"
    r"|can't start new thread"
    r"|could not (create|execute) a primitive$|could not create a memory",  # oneDNN, of its code and its own buffers
    re.IGNORECASE,
)


class OutOfMemory(MemoryError):
    """Memory ran out, and the message says in what, and what would need less."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, in any of the ways that libraries have for it."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    # a ValueError, KeyError or the like quotes what a user gave, and means that
    return isinstance(error, (RuntimeError, ImportError, OSError)) and bool(SAID.search(str(error)))


@contextmanager
def telling_memory(sentence: Callable[[], str]) -> Iterator[None]:
    """Inside the `with` block memory that runs out is an OutOfMemory that says `sentence()`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        raise OutOfMemory(sentence()) from error
