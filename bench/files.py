"""Write a file whole or not at all, and renew what stands between two marks of a text."""

from pathlib import Path


def write(path: Path, text: str) -> None:
    """Under a temporary name first, so that no reader finds half a file."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text, "utf-8")
    unfinished.replace(path)


def between(text: str, begin: str, end: str, body: str, where: str) -> str:
    """`text` with `body` between its two marks. Raises ValueError where they are missing, which names `where`."""
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{where} needs one line {begin} and one {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{body}{end}{rest.split(end)[1]}"
