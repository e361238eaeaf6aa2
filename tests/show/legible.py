"""What is wrong with the text of a figure, as it is drawn: too small, cut off, or over another text."""

import re
from contextlib import contextmanager
from itertools import combinations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from qlora_lab.show.figure import SMALLEST

EXPONENT = re.compile(r"\^\{|[⁰¹²³⁴-⁹]")  # its letters have 70 % of the size
ROOM = 0.3  # of a line's height is room above and below its letters: two lines may share it


@contextmanager
def _noted():
    """Collect each text that is drawn, with its box in pixels."""
    found, draw = [], Text.draw

    def noting(text, renderer):
        if text.get_visible() and text.get_text().strip():
            found.append((text.get_text(), text.get_fontsize(), text.get_window_extent(renderer)))
        draw(text, renderer)

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
    axes = tuple((*ax.get_xlim(), *ax.get_ylim()) for ax in fig.axes)
    kept = {} if kept is None else kept
    if axes not in kept:
        with _noted() as kept[axes]:
            canvas.draw()
    with _noted() as moved:
        for artist in moving:
            fig.draw_artist(artist)
    texts = kept[axes] + moved
    assert texts, "no text was drawn"
    wrong = [f"{text!r} has {size:g} points" for text, size, _ in texts if size < SMALLEST]
    wrong += [f"{text!r} has a raised exponent" for text, _, _ in texts if EXPONENT.search(text)]
    edge = fig.bbox
    for text, _, box in texts:
        if box.x0 < 0 or box.y0 < 0 or box.x1 > edge.x1 or box.y1 > edge.y1:
            wrong.append(f"{text!r} is cut off")
    for (one, small, a), (other, large, b) in combinations(texts, 2):
        wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        if wide > 1 and high > ROOM * min(small, large) * fig.dpi / 72:
            wrong.append(f"{one!r} lies over {other!r}")
    return wrong
