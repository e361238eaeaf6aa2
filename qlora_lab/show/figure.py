"""Show matplotlib figures as `<img alt=...>`, so that a page reads on paper, on a code host and in a screen reader.

nbval compares the alt text but never the pixels, so the numbers in the alt text guard a stored figure. pyplot is never
imported: it keeps each figure alive and would print it twice. The panel is white; where JupyterLab's theme is dark, a
filter of the page turns it dark (DARK).

The rule for text: an inch of a picture takes at least INCH pixels of the page, and no text has fewer points than
SMALLEST. So no text is below 12 pixels, and all grow with the zoom of the browser. A page that is narrower than the
picture scrolls it. Text has a contrast of 4.5 to 1 with what is below it, in both themes. A picture beside the controls
of an explorer is BESIDE inches wide, any other at most ACROSS.

The picture's bytes are stored once, in the HTML. An image/png beside it would store them again; alone it has no alt
text: JupyterLab 4.6, nbconvert's lab template and myst-nb 1.4 do not read {"image/png": {"alt": ...}}.
"""

import base64
import html
import io
import struct
import threading
import zlib
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from qlora_lab.show import lettering
from qlora_lab.show.escape import for_html
from qlora_lab.show.source import details_html

# Okabe and Ito's eight colours, distinct in any colour vision; matplotlib holds the values. Black is for ink; yellow is
# too pale for a line on white.
_NAMES = ("black", "orange", "sky", "green", "yellow", "blue", "red", "purple")
COLOURS = dict(zip(_NAMES, matplotlib.color_sequences["okabe_ito"], strict=True))
_CYCLE = [COLOURS[name] for name in ("blue", "orange", "green", "red", "purple", "sky")]
INCH = 96  # CSS pixels of the page for an inch of a picture, at least: a point is then 4/3 of a pixel
SMALLEST = 9  # points: 12 pixels
TITLE = 11  # points: a picture says its idea in a line above it, and 5 inches of that hold 60 letters
BESIDE = 5.4  # inches: they fit beside the controls in a window of 1280 pixels
ACROSS = 8.0  # inches: a notebook's whole column in that window
DPI = 144
CLOSE = {"columnspacing": 1.0, "handletextpad": 0.4, "borderaxespad": 0.2}  # a legend in little room
IN_DETAIL = ". In detail: "  # in a sentence of numbers, between its short line and the rest
KEPT = 8  # backgrounds of all figures together, of 2 MB each
BAND = 16  # rows that are deflated together; fewer cost more bytes (16 cost 4 %), and of more, some are unchanged
# White becomes a dark grey and black a light one. The turn gives each colour its hue back, so that "blue" stays blue.
# More light keeps orange from brown. Paper is white whatever the theme, hence the screen.
DARKER = "invert(0.93) hue-rotate(180deg) brightness(1.25)"
DARK = f"""@media screen {{
  [data-jp-theme-light="false"] .qlora-picture img {{ filter: {DARKER}; }}
}}"""
DRAWING = threading.RLock()  # rcParams belong to the whole process


def new_figure(columns=1, *, rows=1, width=6.5, height=2.8, heights=None):
    """Make a white figure of `width` x `height` inches and its axes, without pyplot.

    The axes are one, or an array of `columns` or of `rows`. heights: of the rows, beside each other.

    BESIDE and ACROSS are the widths that fit a page. Text keeps the rule above if nothing makes it smaller.
    """
    fig = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")
    axes = fig.subplots(rows, columns, height_ratios=heights)
    for ax in np.ravel(axes):
        ax.set_prop_cycle(color=_CYCLE)
        ax.spines[["top", "right"]].set_visible(False)  # less ink
    return fig, axes


def bars(places, heights, foot=0.0):
    """Return upright lines for a LineCollection, (n, 2, 2) float64: at each place from `foot` to its height."""
    lines = np.full((len(places), 2, 2), float(foot))
    lines[:, :, 0] = np.asarray(places, dtype=float)[:, None]
    lines[:, 1, 1] = heights
    return lines


def all_masked(shape):
    """Make an array of float64, all masked, for an image. Under the mask of numpy's masked_all lies unset memory, with
    which matplotlib computes before it looks at the mask: now and then that overflows."""
    return np.ma.array(np.zeros(shape), mask=True)


def img(png, alt):
    """Return the HTML of one picture: PNG bytes and their alt text.

    A notebook that is not trusted loses the <style>, so there the picture stays white in a dark theme.
    """
    if not alt.strip():
        raise ValueError("alt is empty: say in one sentence what the picture shows, with its key numbers.")
    data = base64.b64encode(png).decode()
    size = f"max-width:100%;min-width:{least_width(png)}px;height:auto"
    image = f'<img alt="{html.escape(alt)}" style="{size}" src="data:image/png;base64,{data}">'
    return f'<div class="qlora-picture" style="overflow-x:auto"><style>{DARK}</style>{image}</div>'


def least_width(png):
    """Return the CSS pixels below which a picture's text would be too small to read; a narrower page scrolls it."""
    (width,) = struct.unpack_from(">I", png, 16)  # a PNG begins with 8 bytes of signature and 8 of a chunk's head
    return round(width * INCH / DPI)


def caption(sentence):
    """Return the HTML of a picture's alt text underneath it, a short line; what follows IN_DETAIL is folded away.

    The line is hidden from screen readers, which have spoken the alt text already; anyone can open the details.
    """
    line, _, details = sentence.partition(IN_DETAIL)
    folded = details_html("In detail", f"<div>{for_html(details)}</div>") if details else ""
    return f'<div aria-hidden="true">{for_html(line)}</div>{folded}'


class Picture:
    """A static figure: HTML with alt text, and the alt text alone for nbval and terminals."""

    def __init__(self, png, alt):
        self.png = png
        self.alt = alt
        self._html = img(png, alt)

    def __repr__(self):
        return self.alt

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"text/html": self._html, "text/plain": self.alt}


class WithSentence(Picture):
    """A picture with its alt text underneath, for readers who see."""

    def _repr_mimebundle_(self, include=None, exclude=None):
        bundle = super()._repr_mimebundle_()
        bundle["text/html"] += caption(self.alt)
        return bundle


def compressed(png):
    """Return PNG bytes of the same picture in 256 colours, in a third of the bytes, for notebooks that store it.

    MAXCOVERAGE keeps rare colours: in the course's pictures no pixel moves by more than 17 of 255, and hardly one by
    more than 1. (MEDIANCUT, Pillow's default, moves some by 90.) It takes 15 ms, so only what is stored is compressed.
    """
    few = Image.open(io.BytesIO(png)).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    out = io.BytesIO()
    few.save(out, "png", optimize=True)
    return out.getvalue()


def picture(fig, alt):
    """Show `fig` in a notebook: put `picture(fig, alt)` on the last line of a cell."""
    out = io.BytesIO()
    with DRAWING:
        fig.savefig(out, format="png", metadata={"Software": None})  # else each matplotlib release changes all pictures
    return Picture(compressed(out.getvalue()), alt)


class Blit:
    """Redraw a few artists of a figure, fast (5 to 20 ms; a full draw with constrained layout takes 200).

    The rest of the figure is drawn once for each setting of the axis limits and kept as pixels. So put all artists that
    move into `moving`, in drawing order; everything else stays as it is after the first frame.

    The backgrounds of all figures together are few: ipywidgets keeps each explorer alive whose cell has run again.
    """

    _backgrounds = {}  # (blit, limits and places of its axes) -> pixels of all that stays

    def __init__(self, fig, moving):
        self.fig = fig
        self.moving = list(moving)
        self.canvas = FigureCanvasAgg(fig)
        for artist in self.moving:
            artist.set_animated(True)  # canvas.draw() skips it

    def frame(self):
        """Return PNG bytes of the figure with its artists as they are now."""
        return png_bytes(self.pixels())

    def pixels(self):
        """Return the same as (height, width, 4) uint8, which the next frame overwrites."""
        with DRAWING, matplotlib.rc_context({"text.hinting": "none"}):  # at 144 dpi as sharp, and half of a text's time
            self.canvas.restore_region(self._background())
            pixels = np.asarray(self.canvas.buffer_rgba())
            for artist in self.moving:
                if isinstance(artist, Text) and lettering.is_plain(artist):
                    lettering.draw(self.fig, artist, pixels)
                else:
                    self.fig.draw_artist(artist)
        return pixels

    def _background(self):
        axes = self, self._axes()
        if axes not in self._backgrounds:
            if len(self._backgrounds) == KEPT:
                self._backgrounds.pop(next(iter(self._backgrounds)))  # the oldest
            self.canvas.draw()
            axes = self, self._axes()  # the layout may have moved them
            self._backgrounds[axes] = self.canvas.copy_from_bbox(self.fig.bbox)
        return self._backgrounds[axes]

    def _axes(self):
        return tuple((*ax.get_xlim(), *ax.get_ylim(), *ax.get_position().bounds) for ax in self.fig.axes)


class _Band(NamedTuple):
    """Some rows of a picture, deflated."""

    rgba: np.ndarray
    deflated: bytes
    adler: int
    length: int  # of the bytes before they were deflated


_bands = {}  # first row -> the band that begins there in the last picture, of whichever figure: 2 MB in all


def png_bytes(rgba):
    """Return PNG bytes of pixels, (height, width, 4) uint8, for the browser that shows them now.

    Pillow takes 11 to 14 ms, mostly to choose a filter for each row. Without filters this takes 4, for 5 % fewer to
    40 % more bytes, and less where rows are as in the picture before: each BAND of rows is deflated by itself.
    """
    height, width, _ = rgba.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)  # 8 bits, RGBA
    deflated = [b"\x78\x01"]  # a zlib stream: a window of 32 kB, level 1
    adler = zlib.adler32(b"")
    for row in range(0, height, BAND):
        rows = rgba[row : row + BAND]
        band = _bands.get(row)
        if band is None or not np.array_equal(band.rgba, rows):
            band = _bands[row] = _deflate(rows)
        deflated.append(band.deflated)
        adler = _adler_of_both(adler, band)
    deflated.append(b"\x03\x00" + struct.pack(">I", adler))  # the last block is empty
    chunks = [(b"IHDR", header), (b"IDAT", b"".join(deflated)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _deflate(rgba):
    rows = np.zeros((len(rgba), 1 + rgba[0].size), np.uint8)  # each row begins with the number of its filter: none
    rows[:, 1:] = rgba.reshape(len(rgba), -1)
    stream = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)  # no header, no sum
    deflated = stream.compress(rows) + stream.flush(zlib.Z_FULL_FLUSH)  # ends with a byte, and refers to nothing before
    return _Band(rgba.copy(), deflated, zlib.adler32(rows), rows.size)


def _adler_of_both(adler, band):
    """Return the Adler-32 of some bytes and a band after them, from the sums of both.

    The low half is 1 plus all bytes; the high half adds up the low one after each byte, here with `low - 1` more.
    """
    low, high = adler & 0xFFFF, adler >> 16
    added_low, added_high = band.adler & 0xFFFF, band.adler >> 16
    return (low + added_low - 1) % 65521 | (high + added_high + band.length * (low - 1)) % 65521 << 16


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
