"""What is wrong with the text of a figure, as it is drawn: too small, cut off, over another text, or hard to tell from
what lies below it, in a light theme or in a dark one."""

import re
from contextlib import contextmanager
from itertools import combinations

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.text import Text

from qlora_lab.show.figure import SMALLEST

EXPONENT = re.compile(r"\^\{|[⁰¹²³⁴-⁹]")  # its letters have 70 % of the size
ROOM = 0.3  # of a line's height is room above and below its letters: two lines may share it
CONTRAST = 4.5  # at least, of text with its ground. Source: WCAG 2.2, 1.4.3, which also defines the luminance below
CROSSED = 0.05  # of a text's box, at most: a dashed line along a number takes more
# hue-rotate(180deg). Source: Filter Effects Module Level 1, "feColorMatrix"
HUE = np.array([[-0.574, 1.430, 0.144], [0.426, 0.430, 0.144], [0.426, 1.430, -0.856]])


def dark(rgb):
    """(..., 3) in [0, 1] -> what the filter of figure.DARK makes of it."""
    inverted = 0.93 - 0.86 * rgb
    return np.clip(1.25 * np.clip(inverted @ HUE.T, 0, 1), 0, 1)


def contrast(one, other):
    one, other = (np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) for c in (one, other))
    one, other = (c @ [0.2126, 0.7152, 0.0722] + 0.05 for c in (one, other))
    return np.maximum(one, other) / np.minimum(one, other)


@contextmanager
def _noted():
    """Collect each text that would be drawn, with its box in pixels; draw what is below it alone."""
    found, draw = [], Text.draw

    def noting(text, renderer):
        if not (text.get_visible() and text.get_text().strip()):
            return
        box = text.get_window_extent(renderer)
        alpha = text.get_alpha()
        found.append((text.get_text(), text.get_fontsize(), box, np.array(to_rgba(text.get_color(), alpha))))
        text._alpha = 0  # its letters, not the box behind them; without set_alpha() no artist becomes stale
        try:
            draw(text, renderer)
        finally:
            text._alpha = alpha

    Text.draw = noting
    try:
        yield found
    finally:
        Text.draw = draw


def faults(fig, moving=(), kept=None):
    """Sentences that name the texts which break the rule of figure.py.

    moving: what Blit draws over the rest. kept: a dict that remembers the rest for each setting of the axes.
    """
    canvas = FigureCanvasAgg(fig)
    renderer = canvas.get_renderer()
    axes = tuple((*ax.get_xlim(), *ax.get_ylim()) for ax in fig.axes)
    kept = {} if kept is None else kept
    if axes not in kept:
        with _noted() as found:
            canvas.draw()
        kept[axes] = found, canvas.copy_from_bbox(fig.bbox)
    found, background = kept[axes]
    renderer.restore_region(background)
    with _noted() as moved:
        for artist in moving:
            fig.draw_artist(artist)
    texts = found + moved
    assert texts, "no text was drawn"
    wrong = [f"{text!r} has {size:g} points" for text, size, *_ in texts if size < SMALLEST]
    wrong += [f"{text!r} has a raised exponent" for text, *_ in texts if EXPONENT.search(text)]
    edge = fig.bbox
    for text, _, box, _ in texts:
        if box.x0 < 0 or box.y0 < 0 or box.x1 > edge.x1 or box.y1 > edge.y1:
            wrong.append(f"{text!r} is cut off")
    for (one, small, a, _), (other, large, b, _) in combinations(texts, 2):
        wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        if wide > 1 and high > ROOM * min(small, large) * fig.dpi / 72:
            wrong.append(f"{one!r} lies over {other!r}")
    pixels = np.asarray(renderer.buffer_rgba())[::-1, :, :3] / 255  # rows from below, as the boxes count
    for text, _, box, colour in texts:
        below = pixels[max(0, round(box.y0) + 2) : round(box.y1) - 2, max(0, round(box.x0) + 2) : round(box.x1) - 2]
        ink = colour[3] * colour[:3] + (1 - colour[3]) * below
        for theme, seen in (("light", np.asarray), ("dark", dark)):
            hard = contrast(seen(ink), seen(below)) < CONTRAST
            lines = hard.any() and (hard.all(0).any() or hard.all(1).any())  # across the whole box
            if lines or hard.sum() > CROSSED * hard.size:
                wrong.append(f"{text!r} is hard to read in a {theme} theme")
    return wrong
