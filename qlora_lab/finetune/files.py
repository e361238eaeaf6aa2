"""Nothing half-written: a folder is made under a temporary name beside its place, and renamed when it is complete.

But: a rename over a folder that is not empty does not exist, so the old one is moved aside first, moved back if the new
one cannot take its place, and removed last.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing_folder(target: str | Path) -> Iterator[Path]:
    """Yields an empty folder to fill; it becomes `target` on success and vanishes on an error."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    new, old = scratch / "new", scratch / "old"
    new.mkdir()
    try:
        yield new
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
