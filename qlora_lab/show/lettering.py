"""Texts that are drawn again and again, kept as pixels: matplotlib takes 1 to 4 ms for one, this takes 0.2.

In: a Text of a figure, and the pixels to draw it into, (height, width, 4) uint8. A text that was drawn before, in the
same look, has its coverage in a dict: for each pixel the share of it that the letters cover. It is laid over the pixels
in the text's colour. Most texts of an explorer stay what they are when a control moves.
"""

import numpy as np
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

KEPT = 512  # texts of all figures together, about 10 kB each
MARGIN = 2  # pixels: letters lean out of the box that their metrics give

_kept: dict[tuple, tuple[int, int, np.ndarray]] = {}  # look -> first row and column from the anchor, coverage


def is_plain(text: Text) -> bool:
    """Tell whether letters are all that the text draws: no box, no outline, nothing clipped or see-through."""
    effects = text.get_bbox_patch() or text.get_path_effects() or text.get_clip_on() or text.get_rotation()
    return type(text) is Text and not effects and text.get_alpha() is None


def draw(fig: Figure, text: Text, pixels: np.ndarray) -> None:
    """Draw a plain text into the pixels of its figure."""
    if not text.get_visible() or not text.get_text().strip():
        return
    x, y = text.get_transform().transform(text.get_unitless_position())  # of its anchor, from the lower left
    column, row = int(x), pixels.shape[0] - int(y)
    # letters stand between pixels as the anchor does: 64 places in each, as FreeType has
    place = int(64 * (x % 1)), int(64 * (y % 1))
    font = text.get_fontproperties()
    look = text.get_text(), hash(font), text.get_ha(), text.get_va(), text.get_parse_math(), fig.dpi, place
    if look in _kept:
        top, left, coverage = _kept[look]
    else:
        top, left, coverage, whole = _coverage(fig, text, row, column, pixels.shape[:2])
        if whole:  # what an edge cuts here has room elsewhere
            if len(_kept) == KEPT:
                _kept.pop(next(iter(_kept)))  # the oldest
            _kept[look] = top, left, coverage
    _lay(coverage, row + top, column + left, np.array(to_rgb(text.get_color())) * 255, pixels)


def _coverage(
    fig: Figure, text: Text, row: int, column: int, shape: tuple[int, int]
) -> tuple[int, int, np.ndarray, bool]:
    """Draw the text alone and cut it out: its place from the anchor, (rows, columns, 1) float32 in [0, 1], and whether
    no edge of the figure cuts it."""
    height, width = shape
    renderer = RendererAgg(width, height, fig.dpi)
    text.draw(renderer)
    box = text.get_window_extent(renderer)
    top, left = height - int(box.y1) - MARGIN, int(box.x0) - MARGIN
    bottom, right = height - int(box.y0) + MARGIN, int(box.x1) + MARGIN
    whole = top >= 0 and left >= 0 and bottom <= height and right <= width
    top, left = max(0, top), max(0, left)  # a slice ends at the other edges by itself
    alpha = np.asarray(renderer.buffer_rgba())[top:bottom, left:right, 3:]
    return top - row, left - column, alpha.astype(np.float32) / 255, whole


def _lay(coverage: np.ndarray, top: int, left: int, colour: np.ndarray, pixels: np.ndarray) -> None:
    """Mix `colour`, three numbers up to 255, into the pixels, as far as each is covered."""
    # in another figure the same text may lean over an edge
    first_row, first_column = max(0, -top), max(0, -left)
    coverage = coverage[first_row:, first_column:]
    below = pixels[top + first_row :, left + first_column :, :3][: coverage.shape[0], : coverage.shape[1]]
    coverage = coverage[: below.shape[0], : below.shape[1]]
    below += np.rint(coverage * (colour - below)).astype(np.int16).astype(np.uint8)  # a sum below zero wraps, and back
