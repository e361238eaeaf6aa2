"""Write a text file whole or not at all, and renew the part of a text between two marks."""

from pathlib import Path

from qlora_lab.files.replace import replacing_file


def write(path: Path, text: str) -> None:
    """Write under a temporary name, then rename, so that no reader finds half a file."""
    with replacing_file(path) as unfinished:
        unfinished.write_text(text, "utf-8")


def between(text: str, begin: str, end: str, body: str, where: str) -> str:
    """Put `body` between the two marks of `text`. Raises ValueError, which names `where`, if a mark is missing."""
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{where} needs one line {begin} and one {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{body}{end}{rest.split(end)[1]}"
