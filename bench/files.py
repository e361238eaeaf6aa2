"""Write a text file whole or not at all, and renew the part of a text between two marks."""

from qlora_lab.files.replace import replace_text as write  # noqa: F401 - the benches take it from here


def between(text: str, begin: str, end: str, body: str, where: str) -> str:
    """Put `body` between the two marks of `text`. Raises ValueError, which names `where`, if a mark is missing."""
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{where} needs one line {begin} and one {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{body}{end}{rest.split(end)[1]}"
