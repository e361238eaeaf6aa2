"""All text of all pictures: 12 pixels of the page at least, none cut off, none over another one, all easy to read."""

import random

import numpy as np
import pytest
from legible import faults
from test_seeing import TOWER
from toy import RoundingExplorer
from toy_checkpoint import toy_checkpoint

from bench.widgets import checkpoint_bytes, merged, smollm2_layers
from qlora_lab.measure.best_plan import Choices
from qlora_lab.quant.plan import Candidate
from qlora_lab.show import adapter_places, results
from qlora_lab.show.answers import AnswerSpeedExplorer
from qlora_lab.show.block_size import BlockSizeExplorer
from qlora_lab.show.constants import ConstantsExplorer
from qlora_lab.show.data_types import CodebookExplorer, OutlierExplorer
from qlora_lab.show.explorer import fix_layout
from qlora_lab.show.figure import ACROSS, BESIDE, DPI, INCH, SMALLEST, new_figure
from qlora_lab.show.kernel_map import KernelMapExplorer
from qlora_lab.show.live import LivePlot
from qlora_lab.show.low_rank import LowRankExplorer
from qlora_lab.show.memory import MemoryExplorer
from qlora_lab.show.midpoint import MidpointExplorer
from qlora_lab.show.normal_float import NormalFloatExplorer
from qlora_lab.show.page_table import PageTableExplorer
from qlora_lab.show.results import Bar
from qlora_lab.show.seeing import SeeingExplorer
from qlora_lab.show.tournament import TournamentExplorer
from qlora_lab.show.xray import XrayExplorer
from qlora_lab.show.zoo import ZooExplorer
from tests.explorers import explorers

LAYERS = smollm2_layers()


def block_sizes(count=4):
    candidates = tuple(Candidate("nf4", 2 ** (5 + i), double) for i in range(count) for double in (False, True))
    bits = np.array([[2**16 * (4 + (8 if c.double_quant else 32) / c.block_size) for c in candidates]] * len(LAYERS))
    gain = np.log2([c.block_size for c in candidates])
    error = np.random.default_rng(0).lognormal(size=(len(LAYERS), 1)) * gain
    return BlockSizeExplorer(Choices(LAYERS, (2**16,) * len(LAYERS), candidates, error, bits))


def many_block_sizes():
    return block_sizes(8)


EXPLORERS = [NormalFloatExplorer, OutlierExplorer, CodebookExplorer, LowRankExplorer, ConstantsExplorer]
EXPLORERS += [KernelMapExplorer, MemoryExplorer, PageTableExplorer, MidpointExplorer, AnswerSpeedExplorer]
EXPLORERS += [TournamentExplorer, ZooExplorer, block_sizes, many_block_sizes, merged, checkpoint_bytes]


def check_ends(explorer):
    """The start, each control at both of its ends, and fifty states on the way through all controls.

    The Blit keeps the background of a setting, and so do we.
    """
    kept = {}
    start = explorer.state
    fig, moving = explorer._blit.fig, explorer._blit.moving
    assert fig.get_figwidth() == BESIDE
    assert faults(fig, moving, kept) == []
    choices = {field: list(getattr(control, "choices", ())) for field, control in explorer._controls.items()}
    choices |= {field: [False, True] for field in start if isinstance(start[field], bool)}
    choices = {field: values for field, values in choices.items() if values}
    for field, values in choices.items():
        for choice in {values[0], values[-1]}:
            explorer.set(**{field: choice})
            assert faults(fig, moving, kept) == [], explorer.code()
        explorer.set(**start)
    drawn = random.Random(0)
    for _ in range(50):
        explorer.set(**{field: drawn.choice(values) for field, values in choices.items()})
        assert faults(fig, moving, kept) == [], explorer.code()


@pytest.mark.slow
@pytest.mark.parametrize("make", EXPLORERS, ids=lambda make: make.__name__)
def test_an_explorer(make):
    check_ends(make())


@pytest.mark.slow
def test_the_xray(tmp_path):
    explorer = XrayExplorer(toy_checkpoint(tmp_path))
    check_ends(explorer)
    explorer.set(tensor="v")  # with groups, and a byte behind the last one
    check_ends(explorer)


@pytest.mark.slow
def test_what_a_tower_sees():
    explorer = SeeingExplorer(TOWER, asked="colour")  # has the most words
    check_ends(explorer)


@pytest.mark.slow
def test_the_live_plot():
    plot = LivePlot(
        type("Training", (), {"settings": type("S", (), {"steps": 60, "eval_every": 5, "max_length": 2048})})
    )
    plot.lines = [{"step": i, "loss": 3.0 - i / 30, "mean_length": 500 * (i % 4)} for i in range(1, 61)]
    plot.training.result = None
    plot.redraw()
    assert faults(plot._blit.fig, plot._blit.moving) == [] and plot._blit.fig.get_figwidth() == ACROSS


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    for module in (adapter_places, results):
        monkeypatch.setattr(module, "picture", lambda fig, alt: figures.append(fig))
    return figures


@pytest.mark.slow
def test_pictures_that_a_function_draws(drawn):
    adapter_places.adapter_places()
    results.exam_and_chat_picture(results.exam_and_chat())
    bars = {name: Bar(1.0, 0.5, 2.0, mark=0.7, note="ranks 3 to 5") for name in ("full fine-tuning", "LoRA", "Houlsby")}
    results.intervals("Loss minus LoRA's", "nats per token", bars, zero="as LoRA", marked="the paper")
    assert len(drawn) == 3
    for fig in drawn:
        assert faults(fig) == [] and fig.get_figwidth() <= ACROSS


@pytest.mark.slow
def test_every_explorer_of_the_course_is_looked_at():
    assert {type(make()) for make in EXPLORERS} | {XrayExplorer, SeeingExplorer} == explorers()


HARD = [("pale", "light"), ("see-through", "light"), ("on green", "dark")]
HARD += [(text, theme) for text in ("crossed", "a wide text with a line") for theme in ("light", "dark")]


def test_each_fault_is_found():
    fig, ax = new_figure(width=2, height=2)
    ax.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(0, 1))
    fix_layout(fig)  # else it would make room
    ax.text(0.1, 0.5, "small", fontsize=8)
    ax.text(0.1, 0.3, "$10^{3}$")
    ax.text(0.1, 0.1, "one text")
    ax.text(0.15, 0.12, "another")
    ax.text(0.5, 0.8, "a text that is wider than the picture")
    ax.text(0.1, 0.65, "pale", color="#777777")  # 4.48 : 1 on white
    ax.text(0.02, 0.85, "see-through", alpha=0.5)
    ax.text(0.5, 0.65, "crossed")
    ax.plot([0.4, 1], [0.68, 0.68], "k", lw=2)
    ax.text(0.02, 0.95, "a wide text with a line", fontsize=9)
    ax.plot([0.2, 0.2], [0.9, 1], "k", lw=1)  # 2 of its pixels
    ax.fill_between([0.3, 0.7], 0.36, 0.48, color="#009e73")
    ax.text(0.5, 0.42, "on green", ha="center", va="center")
    found = faults(fig)
    assert "'small' has 8 points" in found and "'one text' lies over 'another'" in found
    assert "'a text that is wider than the picture' is cut off" in found
    assert "'$10^{3}$' has a raised exponent" in found
    assert {f"{text!r} is hard to read in a {theme} theme" for text, theme in HARD} < set(found) and len(found) == 11


def test_an_inch_is_wide_enough():
    """9 points are an eighth of an inch, which is at least 12 pixels of a page."""
    assert SMALLEST / 72 * INCH == 12 and DPI >= INCH


def test_the_toy():
    explorer = RoundingExplorer()
    assert faults(explorer._blit.fig, explorer._blit.moving) == []
