"""Static pictures and blitting."""

import base64
import io
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import matplotlib
import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image
from toy import RoundingExplorer

from qlora_lab.show import figure
from qlora_lab.show.explorer import fix_layout
from qlora_lab.show.figure import (
    BAND,
    COLOURS,
    IN_DETAIL,
    KEPT,
    Blit,
    Picture,
    WithSentence,
    all_masked,
    caption,
    compressed,
    img,
    new_figure,
    picture,
    png_bytes,
)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def line_figure():
    fig, ax = new_figure()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    (line,) = ax.plot([0, 1], [0, 1])
    return fig, ax, line


@pytest.mark.long
def test_picture_carries_alt_text_in_html_and_plain():
    shown = picture(line_figure()[0], 'A line: "slope" < 2')
    bundle = shown._repr_mimebundle_()
    assert bundle["text/plain"] == 'A line: "slope" < 2'
    assert 'alt="A line: &quot;slope&quot; &lt; 2"' in bundle["text/html"]
    assert f'src="data:image/png;base64,{base64.b64encode(shown.png).decode()}"' in bundle["text/html"]
    assert b"Software" not in shown.png


@pytest.mark.long
@pytest.mark.parametrize("kind", [Picture, WithSentence])
def test_a_notebook_stores_the_bytes_of_a_picture_once(kind):
    """In HTML, where all readers of notebooks find the alt text; an image/png has none in JupyterLab."""
    shown = kind(picture(line_figure()[0], "line").png, "line")
    assert str(shown._repr_mimebundle_()).count(base64.b64encode(shown.png).decode()) == 1


def test_a_caption_folds_the_details_away():
    assert caption("bits < 5. Two. ") == '<div aria-hidden="true">bits &lt; 5. Two. </div>'
    line, folded = caption(f"bits < 5{IN_DETAIL}error > 1").split("<details>")
    assert line == '<div aria-hidden="true">bits &lt; 5</div>'
    assert folded.endswith("In detail</summary><div>error &gt; 1</div></details>")


def test_a_compressed_picture_looks_the_same():
    """Antialiased edges may move by a fifteenth of the range; nearly all pixels do not move at all."""
    fig, _, line = line_figure()
    png = Blit(fig, [line]).frame()
    small = compressed(png)
    assert len(small) < len(png) / 2
    away = np.abs(pixels(small).astype(int) - pixels(png))
    assert (away > 1).mean() < 0.01 and away.max() <= 17


@pytest.mark.long
def test_the_same_figure_gives_the_same_bytes():
    assert picture(line_figure()[0], "line").png == picture(line_figure()[0], "line").png


@pytest.mark.long
@pytest.mark.parametrize("alt", ["", "  \n"])
def test_alt_text_is_required(alt):
    with pytest.raises(ValueError, match="alt is empty: say in one sentence"):
        picture(line_figure()[0], alt)
    with pytest.raises(ValueError, match="alt is empty"):
        img(b"", alt)


@pytest.mark.long
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


def idat(png):
    """The chunks of data, put together, when each chunk's sum is right."""
    Image.open(io.BytesIO(png)).verify()
    start = png.index(b"IDAT")
    (length,) = struct.unpack_from(">I", png, start - 4)
    assert png[start + 4 + length + 4 :][4:8] == b"IEND"
    return png[start + 4 : start + 4 + length]


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)


@st.composite
def films(draw):
    """Pictures one after the other: of two sizes, with all rows new, or with some that change or none."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 3 * BAND + 1), st.integers(1, 9)), min_size=1, max_size=2))
    shown = [noise(*size) for size in sizes]
    for _ in range(draw(st.integers(1, 5))):
        rgba = draw(st.sampled_from(shown)).copy()
        for row in draw(st.sets(st.integers(0, len(rgba) - 1))):
            rgba[row] += 1
        shown.append(rgba)
    return shown


@given(films())
def test_png_bytes_hold_every_pixel(film):
    for rgba in film:
        png = png_bytes(rgba)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), rgba)
        rows = np.frombuffer(zlib.decompress(idat(png)), np.uint8).reshape(len(rgba), -1)  # checks the Adler-32
        assert not rows[:, 0].any() and np.array_equal(rows[:, 1:], rgba.reshape(len(rgba), -1))


def test_png_bytes_depend_on_nothing_but_the_pixels(monkeypatch):
    rgba = noise(5 * BAND, 7)
    some = rgba.copy()
    some[BAND + 3] = 0
    first, second = png_bytes(rgba), png_bytes(some)
    png_bytes(noise(BAND, 9))  # of another size
    assert png_bytes(rgba) == first
    monkeypatch.setattr(figure, "_bands", {})
    assert png_bytes(some) == second


def test_only_rows_that_changed_are_deflated_again(monkeypatch):
    deflated = []
    deflate = figure._deflate
    monkeypatch.setattr(figure, "_bands", {})
    monkeypatch.setattr(figure, "_deflate", lambda rows: deflated.append(len(rows)) or deflate(rows))
    rgba = noise(2 * BAND + 3, 7)
    png_bytes(rgba)
    assert deflated == [BAND, BAND, 3]
    rgba[-1, -1, -1] += 1  # in place, as a canvas draws
    png_bytes(rgba)
    assert deflated[3:] == [3]


def test_what_is_kept_of_a_picture_does_not_grow_with_their_number(monkeypatch):
    monkeypatch.setattr(figure, "_bands", bands := {})
    for seed in range(9):
        png_bytes(noise(2 * BAND, 7, seed))
    assert len(bands) == 2


@pytest.mark.long
def test_a_background_is_drawn_once_for_its_axis_limits(monkeypatch):
    fig, ax, line = line_figure()
    fix_layout(fig)
    blit = Blit(fig, [line])
    draw = blit.canvas.draw
    drawn = []
    monkeypatch.setattr(blit.canvas, "draw", lambda: drawn.append(ax.get_xlim()[1]) or draw())
    ends = range(2, 2 + KEPT)
    frames = {}
    for end in [*ends, *ends]:
        ax.set_xlim(0, end)
        frame = blit.frame()
        assert frame == frames.setdefault(end, frame)
    assert len(set(frames.values())) == KEPT and drawn == list(ends)
    for end in (100, 2):  # one more than are kept: the oldest goes
        ax.set_xlim(0, end)
        frame = blit.frame()
    assert frame == frames[2] and drawn[KEPT:] == [100, 2]


@pytest.mark.long
def test_the_backgrounds_of_all_figures_together_are_kept(monkeypatch):
    """A cell that runs again makes a new explorer, and ipywidgets keeps the old one alive."""
    drawn = []
    blits = []
    for i in range(KEPT + 1):
        fig, _, line = line_figure()
        fix_layout(fig)
        blits.append(Blit(fig, [line]))
        draw = blits[-1].canvas.draw
        monkeypatch.setattr(blits[-1].canvas, "draw", lambda draw=draw, i=i: drawn.append(i) or draw())
        first = blits[-1].frame()
    assert blits[-1].frame() == first and drawn == list(range(KEPT + 1))
    assert blits[0].frame() == first and drawn[KEPT + 1 :] == [0]  # the oldest has gone


def drag(explorer):
    for i in range(40):
        explorer.set(bits=1 + i % 8)


@pytest.mark.long
def test_two_explorers_redraw_in_two_threads():
    """rcParams belong to the whole process: a thread must not restore what the other has set."""
    hinting = matplotlib.rcParams["text.hinting"]
    explorers = RoundingExplorer(), RoundingExplorer()
    with ThreadPoolExecutor() as threads:
        list(threads.map(drag, explorers))
    assert matplotlib.rcParams["text.hinting"] == hinting


@pytest.mark.slow
def test_a_picture_during_a_drag_equals_the_picture_before():
    before = picture(line_figure()[0], "line").png
    explorer = RoundingExplorer()
    with ThreadPoolExecutor() as threads:
        dragged = threads.submit(drag, explorer)
        during = set()
        while not dragged.done():
            during.add(picture(line_figure()[0], "line").png)
    assert during == {before}


@pytest.mark.long
def test_an_old_background_is_not_used_where_the_layout_has_moved_the_axes():
    fig, ax, line = line_figure()
    blit = Blit(fig, [line])
    for end in (1, 10_000_000, 1):
        ax.set_ylim(0, end)  # with wider tick labels the axes are narrower
        frame = blit.frame()
    fresh, other_ax, other = line_figure()
    other_ax.set_ylim(0, 1)
    assert np.array_equal(pixels(frame), pixels(Blit(fresh, [other]).frame()))


@pytest.mark.long
def test_new_axis_limits_redraw_the_background():
    fig, ax, line = line_figure()
    blit = Blit(fig, [line])
    first = pixels(blit.frame())
    ax.set_xlim(0, 100)
    line.set_data([], [])
    ticks = slice(-40, None)  # the rows of the tick labels, which the moving line never touches
    assert not np.array_equal(pixels(blit.frame())[ticks], first[ticks])


@pytest.mark.long
def test_panel_is_white_and_colours_are_okabe_and_itos():
    shown = Image.open(io.BytesIO(picture(line_figure()[0], "line").png)).convert("RGB")
    assert shown.getpixel((0, 0)) == (255, 255, 255)
    assert np.allclose(np.multiply(COLOURS["blue"], 255), (0, 114, 178))
    assert np.allclose(np.multiply(COLOURS["red"], 255), (213, 94, 0))


@pytest.mark.long
def test_pyplot_stays_out():
    code = "import sys, qlora_lab.show.explorer; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_is_masked_is_zero_beneath():
    """matplotlib multiplies it: what memory happened to hold has made it overflow."""
    cells = all_masked((2, 3))
    assert cells.mask.all() and not cells.data.any()
    cells.flat[:2] = 5.0
    assert cells.count() == 2
