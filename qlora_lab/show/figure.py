"""Show matplotlib figures as `<img alt=...>`, so that a page reads on paper, on a code host and in a screen reader.

nbval compares the alt text but never the pixels, so the numbers in the alt text guard a stored figure. pyplot is never
imported: it keeps each figure alive and would print it twice. The panel is white, since black ink on a transparent one
cannot be read in Lab's dark theme.
"""

import base64
import html
import io

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from qlora_lab.show.escape import for_html

# Okabe and Ito's eight colours, distinct in any colour vision; matplotlib holds the values. Black is for ink; yellow is
# too pale for a line on white.
_NAMES = ("black", "orange", "sky", "green", "yellow", "blue", "red", "purple")
COLOURS = dict(zip(_NAMES, matplotlib.color_sequences["okabe_ito"], strict=True))
_CYCLE = [COLOURS[name] for name in ("blue", "orange", "green", "red", "purple", "sky")]


def new_figure(columns=1, *, width=6.5, height=2.8):
    """Make a white figure of `width` x `height` inches and its axes (one, or an array of `columns`), without pyplot.

    6.5 inches at 144 dots fill a notebook's column, and the text stays legible beside an explorer's controls.
    """
    fig = Figure(figsize=(width, height), dpi=144, facecolor="white", layout="constrained")
    axes = fig.subplots(1, columns)
    for ax in np.atleast_1d(axes):
        ax.set_prop_cycle(color=_CYCLE)
        ax.spines[["top", "right"]].set_visible(False)  # less ink
    return fig, axes


def all_masked(shape):
    """Make an array of float64, all masked, for an image. Under the mask of numpy's masked_all lies unset memory, with
    which matplotlib computes before it looks at the mask: now and then that overflows."""
    return np.ma.array(np.zeros(shape), mask=True)


def img(png, alt):
    """Return the HTML of one picture: PNG bytes and their alt text."""
    if not alt.strip():
        raise ValueError("alt is empty: say in one sentence what the picture shows, with its key numbers.")
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(alt)}" style="max-width:100%;height:auto" src="data:image/png;base64,{data}">'


def caption(sentence):
    """Return the HTML of a picture's alt text underneath it, which screen readers have spoken already."""
    return f'<div aria-hidden="true">{for_html(sentence)}</div>'


class Picture:
    """A static figure: HTML with alt text, a PNG for code hosts, and the alt text alone for nbval and terminals."""

    def __init__(self, png, alt):
        self.png = png
        self.alt = alt
        self._html = img(png, alt)

    def __repr__(self):
        return self.alt

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"text/html": self._html, "image/png": base64.b64encode(self.png).decode(), "text/plain": self.alt}


class WithSentence(Picture):
    """A picture with its alt text underneath, for readers who see."""

    def _repr_mimebundle_(self, include=None, exclude=None):
        bundle = super()._repr_mimebundle_()
        bundle["text/html"] += caption(self.alt)
        return bundle


def compressed(png):
    """Return PNG bytes of the same picture in 256 colours, in a third of the bytes: notebooks keep a picture twice.

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
    fig.savefig(out, format="png", metadata={"Software": None})  # else each matplotlib release changes all pictures
    return Picture(compressed(out.getvalue()), alt)


class Blit:
    """Redraw a few artists of a figure, fast (about 20 ms; a full draw with constrained layout takes 200).

    The rest of the figure is drawn once and kept as pixels, until an axis limit changes. So put all artists that move
    into `moving`, in drawing order; everything else stays as it is after the first frame.
    """

    def __init__(self, fig, moving):
        self.fig = fig
        self.moving = list(moving)
        self.canvas = FigureCanvasAgg(fig)
        self._background = self._limits = None  # the first frame draws all
        for artist in self.moving:
            artist.set_animated(True)  # canvas.draw() skips it

    def frame(self):
        """Return PNG bytes of the figure with its artists as they are now."""
        limits = [(ax.get_xlim(), ax.get_ylim()) for ax in self.fig.axes]
        if limits != self._limits:
            self.canvas.draw()
            self._background = self.canvas.copy_from_bbox(self.fig.bbox)
            self._limits = limits
        self.canvas.restore_region(self._background)  # pixels of all that stays
        for artist in self.moving:
            self.fig.draw_artist(artist)
        return self._png()

    def _png(self):
        rgb = np.asarray(self.canvas.buffer_rgba())[..., :3]  # (height, width, 3)
        out = io.BytesIO()
        Image.fromarray(rgb).save(out, "png")
        return out.getvalue()
