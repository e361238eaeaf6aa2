"""Nothing half-written: a folder is made under a temporary name beside its place, and renamed when it is complete.

But: a rename over a folder that is not empty does not exist, so the old one is moved aside first and removed last. A
crash between the two renames leaves the old folder under its `.old` name, whole.
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
    staged = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield staged
        staged.chmod(0o755)  # mkdtemp makes private folders
        old = target.with_name(f"{target.name}.old")
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        staged.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
