"""Take a path as a user writes it, where ~ is the home folder.

In: a path. Out: the same as a Path. A shell expands ~ only at the start of a word, and Python's open does not: without
this, out="~/runs" would make a folder called "~".
"""

import os
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """Return the path with ~ and ~user expanded. A user whom the system does not know is left as it is.

    Calling it again changes nothing: a path that still begins with ~, such as "./~", becomes absolute.
    """
    place = Path(os.path.expanduser(path))  # Path.expanduser raises RuntimeError for an unknown user
    return place.absolute() if str(place).startswith("~") else place
