"""Make the slides of the two-hour lab from tagged cells of the notebooks: `make slides`.

In: the stored notebooks, in which a cell tagged `slide-05` is on the face of slide 5, and one tagged `notes-05` in its
notes, the answer to its question. Out: one page, build/slides.html, which opens from disk, needs no network, and prints
one slide a page. Slides are sorted by number; cells stay in the order of their notebook.

What a face shows: of prose, the first heading and the paragraph that asks ("**Predict**"), or else the first one; the
other paragraphs of that cell go to the notes. Of code: its pictures, or else what it prints, or else its source.

Not here: what the page looks like and its keys (slides.css, slides.js).
"""

import argparse
import html
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt

from qlora_lab.files.replace import replace_text
from tools.notebook_rules import headings

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "build" / "slides.html"
LOOK = Path(__file__).with_name("slides.css")
KEYS = Path(__file__).with_name("slides.js")
TITLE = "QLoRA in two hours"
_TAG = re.compile(r"(slide|notes)-(\d\d)")
_IMAGE = re.compile(r"<img\b[^>]*>")
_ALT, _SOURCE = (re.compile(rf'\b{name}="([^"]*)"') for name in ("alt", "src"))
_LINK = re.compile(r"\[([^]]*)\]\([^)]*\)")  # a slide has no page to lead to
_FOLDED = re.compile(r"</?details>|<summary>.*?</summary>")
_UNASKED = re.compile(r" \(You recorded no guess\.\)| Run this cell to guess\.")
_MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")  # HTML in a cell is escaped


@dataclass
class Slide:
    """One slide: HTML of its face and of its notes. section: the nearest heading above its last cell."""

    number: int
    notebook: str
    title: str = ""
    section: str = ""
    face: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def slides() -> list[Slide]:
    """All slides, in order. Raises ValueError for a number with notes and no face, or in two notebooks, or for a face
    of a heading alone."""
    found: dict[int, Slide] = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        section = ""
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            source = "".join(cell["source"])
            marks = [match for tag in cell["metadata"].get("tags", ()) if (match := _TAG.fullmatch(tag))]
            for place, number in ((mark[1], int(mark[2])) for mark in marks):
                slide = found.setdefault(number, Slide(number, path.stem))
                if slide.notebook != path.stem:
                    raise ValueError(f"slide {number} has cells of {slide.notebook} and {path.stem}: renumber one")
                _add(slide, place, cell, source, section)
            if cell["cell_type"] == "markdown":
                section = [section, *(text for _, text in headings(source))][-1]
    for slide in found.values():
        if not slide.face:
            raise ValueError(f"slide {slide.number} has notes and no face: tag a cell slide-{slide.number:02}")
        slide.title = slide.title or slide.section
    return [found[number] for number in sorted(found)]


def _add(slide: Slide, place: str, cell: dict, source: str, section: str) -> None:
    """Add a cell to the face or to the notes of its slide."""
    if cell["cell_type"] == "code":
        getattr(slide, "face" if place == "slide" else "notes").append(_code(cell, source))
    elif place == "notes":
        slide.notes.append(_prose(source))
    else:
        own = [text for _, text in headings(source)]
        slide.title = slide.title or next(iter(own), "")
        shown, rest = _split(source)
        slide.face.append(_prose(shown))
        slide.notes += [_prose(rest)] if rest else []
    if place == "slide":
        slide.section = section


def _split(source: str) -> tuple[str, str]:
    """The paragraph for the face, and what is left of a cell, both without headings."""
    parts = _paragraphs(source)
    if not parts:
        raise ValueError("a cell tagged slide-NN has a heading and no paragraph: tag the next one")
    chosen = next((part for part in parts if "**Predict" in part), parts[0])
    return chosen, "\n\n".join(part for part in parts if part is not chosen)


def _paragraphs(markdown: str) -> list[str]:
    """The paragraphs without headings: a slide has its title at the top."""
    return [part for part in re.split(r"\n\n+", markdown.strip()) if not part.startswith("#")]


def _prose(markdown: str) -> str:
    """Markdown as HTML, without links, and with what is folded away in a notebook unfolded."""
    text = "\n\n".join(_paragraphs(_FOLDED.sub("", markdown)))
    text = re.sub(r"\*\*Predict(?: first)?:\*\*", "**Predict:**", _LINK.sub(r"\1", text))
    return _MARKDOWN.render(text)


def _code(cell: dict, source: str) -> str:
    """A code cell: its pictures, or else its text, or else its source."""
    pages = ["".join(output.get("data", {}).get("text/html", "")) for output in cell["outputs"]]
    pictures = [picture for page in pages for tag in _IMAGE.findall(page) if (picture := _picture(tag))]
    if pictures:
        return "\n".join(pictures)
    texts = ["".join(o.get("text", "") or o.get("data", {}).get("text/plain", "")) for o in cell["outputs"]]
    # a progress bar is not a result
    kept = [_UNASKED.sub("", text).rstrip() for text in texts if text.strip() and "%|" not in text]
    if not kept:
        return f"<pre>{html.escape(source)}</pre>"
    return f"<pre>{html.escape(chr(10).join(kept))}</pre>"


def _picture(tag: str) -> str:
    """An <img> with its alt text and its data, and nothing else of it. "" for one that would need a network."""
    alt, source = _ALT.search(tag), _SOURCE.search(tag)
    if not (alt and source and source[1].startswith("data:image/")):
        return ""
    return f'<img alt="{alt[1]}" src="{source[1]}">'


def page() -> str:
    """The whole page as HTML."""
    made = slides()
    sections = "\n".join(_section(slide, f"{place} / {len(made)}") for place, slide in enumerate(made, 1))
    head = f'<meta charset="utf-8"><title>{TITLE}</title><meta name="viewport" content="width=device-width">'
    look, keys = LOOK.read_text("utf-8"), KEYS.read_text("utf-8")
    help_ = "Left and right arrow: previous and next. N: notes. Print: one slide a page."
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}\n<style>\n{look}</style>\n</head>\n<body>\n'
        f'<main>\n{sections}\n</main>\n<p id="keys">{help_}</p>\n<script>\n{keys}</script>\n</body>\n</html>\n'
    )


def _section(slide: Slide, place: str) -> str:
    notes = "\n".join(slide.notes)
    aside = f'<aside aria-label="Notes">\n{notes}</aside>\n' if notes else ""
    foot = f"<footer>{slide.notebook} <span>{place}</span></footer>"
    title = _MARKDOWN.renderInline(_LINK.sub(r"\1", slide.title))
    face = "\n".join(slide.face)
    return f'<section id="{slide.number}">\n<h1>{title}</h1>\n<div>\n{face}</div>\n{foot}\n{aside}</section>'


def main(argv: list[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description="Make the slides of the two-hour lab from tagged cells.")
    parser.add_argument("--out", type=Path, default=PAGE, help="(%(default)s)")
    out = parser.parse_args(argv).out
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, page())
    print(out)


if __name__ == "__main__":
    main()
