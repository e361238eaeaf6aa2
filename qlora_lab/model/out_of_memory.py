"""Turn every error for memory that ran out into one: it says what needed the memory, and what would need less."""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SAID = re.compile(
    r"not enough memory|can(no|')t allocate memory|out of memory|bad_alloc|failed to map segment|unable to mmap"
    r"|can't start new thread"
    r"|could not (create|execute) a primitive$|could not create a memory",  # oneDNN, for its code and its own buffers
    re.IGNORECASE,
)


class OutOfMemory(MemoryError):
    """Memory ran out; the message says where, and what would need less."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory ran out, in any library's words."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    # A ValueError, KeyError or the like may merely quote such words from the user's input.
    return isinstance(error, (RuntimeError, ImportError, OSError)) and bool(SAID.search(str(error)))


@contextmanager
def telling_memory(sentence: Callable[[], str]) -> Iterator[None]:
    """Raise OutOfMemory with `sentence()` when memory runs out inside the `with` block."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):  # an inner block has said it better
            raise
        raise OutOfMemory(sentence()) from error
