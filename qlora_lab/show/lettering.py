"""Texts that are drawn again and again, kept as pixels: matplotlib takes 1 to 4 ms for one. This takes 0.14 for one
that was there before, and 1.6 for a title with two new words.

In: a Text of a figure, and the pixels to draw it into, (height, width, 4) uint8. matplotlib says where each line of a
text stands. A word that was drawn before, in the same look, has its coverage in a dict: for each pixel the share of it
that the letters cover. It is laid over the pixels in the text's colour.

Most texts of an explorer stay what they are when a control moves. So do most words of a title: all digits are equally
wide, so what follows a number stays in its place.
"""

import re
from collections.abc import Callable, Hashable, Iterator
from functools import cache
from math import ceil
from typing import NamedTuple

import numpy as np
from matplotlib import rcParams
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text

KEPT = 512  # texts of all figures together, and as many words of 3 to 5 kB; a text keeps its own: 16 MB with ten each


class Piece(NamedTuple):
    """A word: what its letters cover, (rows, columns, 1) float32 in [0, 1], and where that begins."""

    row: int
    column: int
    coverage: np.ndarray


Size = tuple[float, float, float]  # of letters in pixels: advance, height, how far they descend below the baseline
_texts: dict[Hashable, list[Piece]] = {}  # text, look and place -> its words in the figure
_words: dict[Hashable, Piece] = {}  # word, look and place between pixels -> from the pixel in which it begins
_sizes: dict[Hashable, Size] = {}  # letters and look -> their size


def is_plain(text: Text) -> bool:
    """Tell whether letters are all that the text draws: no box, no outline, no formula, nothing clipped or see-through.

    A title has clip_on, but nothing that it would be clipped by.
    """
    clipped = text.get_clip_on() and (text.get_clip_box() or text.get_clip_path())
    effects = text.get_bbox_patch() or text.get_path_effects() or text.get_rotation() or text.get_usetex()
    shaped = text.get_wrap() or text.get_fontfeatures() or text.get_language() or not text.get_antialiased()
    opaque = text.get_alpha() is None and to_rgba(text.get_color())[3] == 1
    return type(text) is Text and opaque and not (clipped or effects or shaped or "$" in text.get_text())


def draw(fig: Figure, text: Text, pixels: np.ndarray) -> None:
    """Draw a plain text into the pixels of its figure, under figure.DRAWING: what is kept belongs to the process."""
    if not text.get_visible() or not text.get_text().strip():
        return
    place = *text.get_transform().transform(text.get_unitless_position()), len(pixels)
    lines = text.get_ha(), text.get_va(), text.get_linespacing(), text._get_multialignment()
    look = text.get_text(), _font(text.get_fontproperties()), lines, fig.dpi, place
    colour = np.array(to_rgb(text.get_color())) * 255
    for piece in _kept(_texts, look, lambda: _pieces(text, fig.dpi, len(pixels))):
        _lay(piece, colour, pixels)


def _font(font: FontProperties) -> Hashable:
    """All that chooses the letters: a family such as "sans-serif" is a list in matplotlib's settings."""
    return hash(font), *(tuple(rcParams[f"font.{family}"]) for family in ("sans-serif", "serif", "monospace"))


def _kept(values: dict, key: Hashable, make: Callable):
    value = values.pop(key) if key in values else make()
    if len(values) == KEPT:
        values.pop(next(iter(values)))  # the one that nobody has asked for the longest
    values[key] = value
    return value


class _Lines(RendererAgg):
    """Notes where matplotlib would draw the lines of a text. A line's size comes from its words, which may be known."""

    def __init__(self, dpi: float):
        super().__init__(1, 1, dpi)
        self.lines: list[tuple[float, float, str]] = []  # pixels from the lower left

    def draw_text(self, gc, x, y, s, *font, **kind):  # Text.draw calls it for each line
        self.lines.append((x, self.height - y, s))

    def get_text_width_height_descent(self, s, prop, ismath):
        # the sizes of the letters' box from the baseline up and down; a box is as wide as the letters advance
        sizes = [size for _, size in self.words(s, prop)]
        descent = max(descent for _, _, descent in sizes)
        ascent = max(height - descent for _, height, descent in sizes)
        return sum(width for width, _, _ in sizes), ascent + descent, descent

    def words(self, line: str, font: FontProperties) -> Iterator[tuple[str, Size]]:
        """Yield each word with the spaces about it and its size: up to the next word, to which the font may kern it.

        A line that is not ASCII is one word: in some scripts the first one stands at the right.
        """
        words = re.findall(r" *\S+ *", line) if line.isascii() and line.isprintable() else []
        for word, after in zip(words or [line], [*words[1:], ""], strict=True):
            width, height, descent = self._size(word + after[:1], font)
            yield word, (width - (self._size(after[0], font)[0] if after else 0), height, descent)

    def _size(self, letters: str, font: FontProperties) -> Size:
        measure = super().get_text_width_height_descent
        return _kept(_sizes, (letters, _font(font), self.dpi), lambda: measure(letters, font, False))


_lines = cache(_Lines)  # dpi -> a renderer; matplotlib keeps sizes of lines for each


def _pieces(text: Text, dpi: float, height: int) -> list[Piece]:
    """Take the words of a text, each where it stands in a figure of `height` rows."""
    renderer, font = _lines(dpi), text.get_fontproperties()
    renderer.lines.clear()
    text.draw(renderer)
    pieces = []
    for x, y, line in renderer.lines:
        row, up = divmod(_place(y), 64)
        along = _place(x)
        for word, size in renderer.words(line, font):
            if word.strip():
                column, right = divmod(along, 64)
                look = word, _font(font), dpi, right, up
                piece = _kept(_words, look, lambda word=(word, size, right, up): _word(font, dpi, *word))
                pieces.append(Piece(height - int(row) + piece.row, int(column) + piece.column, piece.coverage))
            along += 64 * size[0]
    return pieces


def _place(pixels: float) -> float:
    """Return the place in 64ths of a pixel, to which FreeType rounds it. Halfway it rounds each letter its own way."""
    place = 64 * pixels
    return place if place % 1 == 0.5 else round(place)


def _word(font: FontProperties, dpi: float, word: str, size: Size, right: float, up: float) -> Piece:
    """Draw a word that begins `right` and `up` 64ths of a pixel from the corner of a pixel, and cut it out."""
    width, height, descent = size
    room = ceil(font.get_size_in_points() * dpi / 72)  # letters lean out of the box that their metrics give
    baseline = room + ceil(height - descent)
    renderer = RendererAgg(2 * room + ceil(width), baseline + ceil(descent) + room, dpi)
    renderer.draw_text(renderer.new_gc(), room + right / 64, baseline - up / 64, word, font, 0)
    alpha = np.asarray(renderer.buffer_rgba())[..., 3:]
    if not alpha.any():  # a space without width
        return Piece(0, 0, np.zeros((0, 0, 1), np.float32))
    rows, columns = np.flatnonzero(alpha.any(axis=(1, 2))), np.flatnonzero(alpha.any(axis=(0, 2)))
    inked = alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Piece(rows[0] - baseline, columns[0] - room, inked.astype(np.float32) / 255)


def _lay(piece: Piece, colour: np.ndarray, pixels: np.ndarray) -> None:
    """Mix `colour`, three numbers up to 255, into the pixels, as far as each is covered; an edge may cut the word."""
    top, left = max(0, piece.row), max(0, piece.column)
    coverage = piece.coverage[top - piece.row :, left - piece.column :]
    below = pixels[top:, left:, :3][: coverage.shape[0], : coverage.shape[1]]
    coverage = coverage[: below.shape[0], : below.shape[1]]
    below += np.rint(coverage * (colour - below)).astype(np.int16).astype(np.uint8)  # a sum below zero wraps, and back
