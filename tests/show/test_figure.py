"""Static pictures and blitting."""

import base64
import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from qlora_lab.show.figure import COLOURS, Blit, all_masked, compressed, img, new_figure, picture


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def line_figure():
    fig, ax = new_figure()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    (line,) = ax.plot([0, 1], [0, 1])
    return fig, ax, line


def test_picture_carries_alt_text_in_html_and_plain():
    bundle = picture(line_figure()[0], 'A line: "slope" < 2')._repr_mimebundle_()
    assert bundle["text/plain"] == 'A line: "slope" < 2'
    assert 'alt="A line: &quot;slope&quot; &lt; 2"' in bundle["text/html"]
    assert bundle["image/png"] in bundle["text/html"]
    assert b"Software" not in base64.b64decode(bundle["image/png"])


def test_a_compressed_picture_looks_the_same():
    """Antialiased edges may move by a fifteenth of the range; nearly all pixels do not move at all."""
    fig, _, line = line_figure()
    png = Blit(fig, [line]).frame()
    small = compressed(png)
    assert len(small) < len(png) / 2
    away = np.abs(np.asarray(Image.open(io.BytesIO(small)).convert("RGB")).astype(int) - pixels(png))
    assert (away > 1).mean() < 0.01 and away.max() <= 17


def test_the_same_figure_gives_the_same_bytes():
    assert picture(line_figure()[0], "line").png == picture(line_figure()[0], "line").png


@pytest.mark.parametrize("alt", ["", "  \n"])
def test_alt_text_is_required(alt):
    with pytest.raises(ValueError, match="alt is empty: say in one sentence"):
        picture(line_figure()[0], alt)
    with pytest.raises(ValueError, match="alt is empty"):
        img(b"", alt)


def test_a_blitted_frame_equals_a_full_draw():
    fig, _, line = line_figure()
    blit = Blit(fig, [line])
    blit.frame()
    line.set_data([0, 1], [1, 0])
    fresh, _, other = line_figure()
    other.set_data([0, 1], [1, 0])
    assert np.array_equal(pixels(blit.frame()), pixels(Blit(fresh, [other]).frame()))


def test_nothing_of_the_old_frame_stays():
    fig, _, line = line_figure()
    blit = Blit(fig, [line])
    first = blit.frame()
    line.set_data([0, 1], [1, 0])
    assert blit.frame() != first
    line.set_data([0, 1], [0, 1])
    assert blit.frame() == first


def test_new_axis_limits_redraw_the_background():
    fig, ax, line = line_figure()
    blit = Blit(fig, [line])
    first = pixels(blit.frame())
    ax.set_xlim(0, 100)
    line.set_data([], [])
    ticks = slice(-40, None)  # the rows of the tick labels, which the moving line never touches
    assert not np.array_equal(pixels(blit.frame())[ticks], first[ticks])


def test_panel_is_white_and_colours_are_okabe_and_itos():
    shown = Image.open(io.BytesIO(picture(line_figure()[0], "line").png)).convert("RGB")
    assert shown.getpixel((0, 0)) == (255, 255, 255)
    assert np.allclose(np.multiply(COLOURS["blue"], 255), (0, 114, 178))
    assert np.allclose(np.multiply(COLOURS["red"], 255), (213, 94, 0))


def test_pyplot_stays_out():
    code = "import sys, qlora_lab.show.explorer; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_is_masked_is_zero_beneath():
    """matplotlib multiplies it: what memory happened to hold has made it overflow."""
    cells = all_masked((2, 3))
    assert cells.mask.all() and not cells.data.any()
    cells.flat[:2] = 5.0
    assert cells.count() == 2
