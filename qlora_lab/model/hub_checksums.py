"""Compare fetched files with the Hugging Face hub's checksums, which are their names in the local cache.

Source: huggingface_hub's cache, where a snapshot's files are links to `blobs/CHECKSUM`: 64 digits are the sha256 of a
large file (LFS), 40 are git's, of a small one. Without links (Windows without developer mode), nothing is known.
"""

import re
from pathlib import Path

from tqdm.auto import tqdm

from qlora_lab.files.checksums import digest_like

CHECKSUM = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


def hub_files(folder: Path) -> dict[str, str]:
    """Return name -> the hub's checksum for each file of a snapshot; an empty dict for any other folder."""
    if folder.resolve().parent.name != "snapshots":  # another folder may hold a whole disk to walk
        return {}
    links = (path for path in sorted(folder.rglob("*")) if path.is_symlink())
    targets = {path.relative_to(folder).as_posix(): path.readlink() for path in links}
    return {
        name: target.name
        for name, target in targets.items()
        if target.parent.name == "blobs" and CHECKSUM.fullmatch(target.name)
    }


def differing(folder: Path, progress: bool = False) -> list[Path]:
    files = {folder / name: digest for name, digest in hub_files(folder).items()}
    size = sum(file.stat().st_size for file in files)
    with tqdm(total=size, desc="checking", unit="B", unit_scale=True, delay=2, disable=not progress) as bar:
        return [file for file, digest in files.items() if digest_like(digest, file, bar.update) != digest]
