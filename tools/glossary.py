"""Link each term of notebooks/glossary.md where the course first uses it.

    python -m tools.glossary     take out all links to the glossary, and set them again

In: the glossary's headings and the prose of the notebooks. Out: the same notebooks, in which the first use of a term
is a link: in the order of the course, and in the order of the spine, for those who read nothing else. Cells of code
and outputs stay as they are.

What is not prose has no link: headings, code, formulas, names of controls, and what links somewhere else already.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import nbformat

from qlora_lab.files.replace import replace_text
from tools.notebooks import NOTEBOOKS, solution_of, text_of
from tools.syllabus import SPINE

PAGE = NOTEBOOKS / "glossary.md"
COMMAND = "python -m tools.glossary"
LINK = re.compile(r"\[([^]]*)\]\((?:\.\./)?glossary\.md#([\w-]+)\)")
# A constant's name is always written as code, so that alone of all code may be linked.
_NO_PROSE = re.compile(
    r"^```.*?^```|^#.*?$|\$\$.*?\$\$|\$[^$\n]+\$|(?!`absmax`)`[^`]*`|\[[^]]*\]\([^)]*\)|<[^>]+>|\*\*[^*\n]+\*\*:",
    re.M | re.S,
)
# How a term is written in prose, where it is not its heading with or without an s.
_FORMS = {
    "absmax": r"`absmax`|\babsmax\b",
    "adamw": r"(?-i:\bAdamW?\b)",
    "backward pass": r"\bbackward(?: pass(?:es)?)?\b",
    "bf16": r"\bbf(?:loat)?16\b",
    "double quantization": r"\bdouble quanti[sz]ation\b",
    "evict": r"\bevict(?:s|ed|ing)?\b",
    "fused": r"\bfus(?:ed?|ing)\b",
    "gradient checkpointing": r"\b(?:gradient )?checkpointing\b",
    "kl divergence": r"(?-i:\bKL\b)(?: divergence)?",
    "lora": r"(?-i:\bLoRA\b)",
    "loss": r"\bloss(?:es)?\b",
    "merge": r"\bmerg(?:e[ds]?|ing)\b",
    "mlp": r"(?-i:\bMLP\b)|\bfeed-forward\b",
    "moments": r"(?<!second )\bmoments?\b",  # of the optimizer, not of a layer's inputs
    "page": r"(?<!blank )(?<!this )\bpages?\b",
    "page fault": r"(?<!any )(?<!its )\b(?:page )?faults?\b",  # not those of a file
    "paged optimizer": r"\bpaged optimizers?\b",
    "perplexity": r"\bperplexit(?:y|ies)\b",
    "quantise": r"(?<!double )(?<!block-wise )\bquanti[sz](?:e[ds]?|ing|ation)\b",
    "rmsnorm": r"\bRMSNorms?\b",
}


class Term(NamedTuple):
    """A heading of the glossary, how prose writes it, and the notebooks that its entry names."""

    name: str
    pattern: re.Pattern
    notebooks: tuple[str, ...]

    @property
    def anchor(self) -> str:
        """What a link to it names."""
        return self.name.replace(" ", "-")


def terms() -> list[Term]:
    """All terms of the page, longest first: "page fault" is looked for before "page"."""
    parts = re.split(r"^## (.*)$", PAGE.read_text("utf-8"), flags=re.M)[1:]
    found = [
        Term(name, re.compile(_FORMS.get(name, rf"\b{name}s?\b"), re.I), tuple(re.findall(r"\((\w+)\.ipynb\)", text)))
        for name, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    return sorted(found, key=lambda term: -len(term.name))


def orders() -> tuple[list[Path], list[Path]]:
    """The students' notebooks in the order of the course, and those of the spine."""
    course = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    return course, [path for number in SPINE for path in course if path.name[:2] == number]


def unlinked(notebooks: Sequence[tuple[str, list[str]]], wanted: Sequence[Term]) -> Iterator[tuple[str, int, Term]]:
    """First uses without a link: the notebook's name, the cell, the term. notebooks: names and cells of markdown."""
    for term in wanted:
        uses = ((name, i, text) for name, cells in notebooks for i, text in enumerate(cells))
        for name, i, text in uses:
            plain, linked = _first(text, term)
            if plain is not None and not (linked is not None and linked < plain):
                yield name, i, term
            if plain is not None or linked is not None:
                break


def _first(text: str, term: Term) -> tuple[int | None, int | None]:
    """Where in a cell the term stands first without a link, and where its first link is."""
    found = term.pattern.search(_prose_alone(text))
    link = next((link for link in LINK.finditer(text) if link[2] == term.anchor), None)
    return found and found.start(), link and link.start()


@cache  # a cell is looked through once for each term
def _prose_alone(text: str) -> str:
    """Blank out what is no prose; every other letter stays in its place."""
    return _NO_PROSE.sub(lambda part: " " * len(part[0]), text)


def link_first(text: str, term: Term, prefix: str) -> str:
    """Make the first use in a cell a link."""
    found = term.pattern.search(_prose_alone(text))
    word = text[found.start() : found.end()]
    return f"{text[: found.start()]}[{word}]({prefix}glossary.md#{term.anchor}){text[found.end() :]}"


def link_all(paths: Sequence[Path]) -> None:
    """Set the links in the students' notebooks at `paths`, in this order, and in their solutions."""
    read = {path: nbformat.read(path, 4) for path in paths}
    solutions = {solution_of(path): nbformat.read(solution_of(path), 4) for path in paths if solution_of(path).exists()}
    for notebook in (*read.values(), *solutions.values()):
        for cell in _prose(notebook):
            cell.source = LINK.sub(r"\1", cell.source)
    spine = {path.name for path in orders()[1]}
    for term in terms():
        _link(read, solutions, term)
        _link({path: notebook for path, notebook in read.items() if path.name in spine}, solutions, term)
    for path, notebook in (read | solutions).items():
        if text_of(notebook) != path.read_text("utf-8"):
            replace_text(path, text_of(notebook))


def _link(read: dict, solutions: dict, term: Term) -> None:
    """Link one term in the first of the notebooks that uses it."""
    names = [(path, [cell.source for cell in _prose(notebook)]) for path, notebook in read.items()]
    for path, i, _ in unlinked(names, [term]):
        cells = _prose(read[path])
        cells[i].source = link_first(cells[i].source, term, "")
        if solution_of(path) in solutions:
            cells = _prose(solutions[solution_of(path)])
            cells[i].source = link_first(cells[i].source, term, "../")


def _prose(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "markdown"]


def main() -> None:
    """Link the whole course."""
    link_all(orders()[0])


if __name__ == "__main__":
    main()
