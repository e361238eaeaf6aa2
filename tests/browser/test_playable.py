"""Pages of explorers, from disk and without a network: each control moved by key, and the state of the kernel shown."""

import ast
import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import expect

from qlora_lab.data.shapes import Scene
from qlora_lab.export.parity import Change, Parity
from qlora_lab.export.survival import Survival
from qlora_lab.export.xray import Checkpoint
from qlora_lab.measure.best_plan import Choices
from qlora_lab.quant.plan import Candidate
from qlora_lab.show import playable
from qlora_lab.show.answers import AnswerSpeedExplorer
from qlora_lab.show.block_size import BlockSizeExplorer
from qlora_lab.show.constants import ConstantsExplorer
from qlora_lab.show.data_types import CodebookExplorer, OutlierExplorer
from qlora_lab.show.figure import DARKER, IN_DETAIL
from qlora_lab.show.follow_weight import FollowWeight
from qlora_lab.show.kernel_map import KernelMapExplorer
from qlora_lab.show.low_rank import LowRankExplorer
from qlora_lab.show.memory import MemoryExplorer
from qlora_lab.show.midpoint import MidpointExplorer
from qlora_lab.show.normal_float import NormalFloatExplorer
from qlora_lab.show.page_table import PageTableExplorer
from qlora_lab.show.seeing import SeeingExplorer
from qlora_lab.show.survival import SurvivalExplorer
from qlora_lab.show.tournament import TournamentExplorer
from qlora_lab.show.xray import XrayExplorer
from qlora_lab.show.zoo import ZooExplorer
from qlora_lab.train.toy_llava import trained_tower
from tests.browser.controls import EXPLORERS, FOCUSABLE, KIND, by_key
from tests.browser.theme import FAINT
from tests.explorers import explorers
from tests.show.toy_checkpoint import toy_checkpoint

ROOT = Path(__file__).parents[2]
PACE, STATION = 250, 3000  # milliseconds between two moves of Play: of a slider, and of the map
MOST = 80  # states of a page here; the whole page takes half a minute
FAR = 17  # of 255, of a pixel: 256 colours for all states of a page; figure.compressed allows as much for one
SHOWN = "canvas => canvas.toDataURL().split(',')[1]"
CUT_OFF = "() => document.documentElement.scrollWidth > window.innerWidth"

LAYERS = tuple(f"model.layers.{i}.{part}_proj" for i in range(4) for part in ("self_attn.q", "mlp.up"))
SIZES = tuple(Candidate("nf4", size, False) for size in (32, 64, 128))
ERRORS = np.random.default_rng(0).lognormal(size=(len(LAYERS), 1)) * np.array([5.0, 6, 7])
BITS = np.array([[2**16 * (4 + 32 / size.block_size) for size in SIZES]] * len(LAYERS))


def reports():
    """What a merge keeps of a change and of four times it."""
    made = {factor: {layer: Change(0.1 * factor, 0.02 * factor) for layer in LAYERS} for factor in (1, 4)}
    return {f: Parity("requantised", 0.3 * f, 0.4 * f, 0.9, 18.0, 19.0, 256, 0.05, made[f]) for f in made}


def block_size(**state):
    return BlockSizeExplorer(Choices(LAYERS, (2**16,) * len(LAYERS), SIZES, ERRORS, BITS), **state)


def survival(**state):
    return SurvivalExplorer(Survival(dict.fromkeys(LAYERS, 0.01), reports()), **state)


MAKERS = {
    kind.__name__: kind
    for kind in (
        AnswerSpeedExplorer,
        CodebookExplorer,
        ConstantsExplorer,
        KernelMapExplorer,
        LowRankExplorer,
        MemoryExplorer,
        MidpointExplorer,
        NormalFloatExplorer,
        OutlierExplorer,
        PageTableExplorer,
        TournamentExplorer,
        ZooExplorer,
    )
} | {"BlockSizeExplorer": block_size, "SurvivalExplorer": survival}


@pytest.fixture(scope="module")
def makers(tmp_path_factory):
    """Name -> what makes an explorer of it in a given state: all that there are."""
    checkpoint: Checkpoint = toy_checkpoint(tmp_path_factory.mktemp("toy"))
    tower = trained_tower([Scene("red", "ring", "two", "left")], 1, progress=False)
    made = {
        "XrayExplorer": lambda **state: XrayExplorer(checkpoint, **state),
        "SeeingExplorer": lambda **state: SeeingExplorer(tower, **state),
    }
    return MAKERS | made


@pytest.fixture
def open_page(context):
    """Open a file in a context of its own that has no network, and notes whatever asks for one."""
    alone = context.browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    wrong = []

    def opened(path):
        page = alone.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        page.on("request", lambda asked: asked.url.startswith(("file:", "data:")) or wrong.append(asked.url))
        page.goto(path.as_uri())
        return page

    yield opened
    alone.close()
    assert not wrong, wrong


def test_every_explorer_is_here(makers):
    assert set(makers) == {kind.__name__ for kind in explorers()}


NAMES = [*MAKERS, "XrayExplorer", "SeeingExplorer"]


@pytest.mark.parametrize("name", NAMES)
def test_each_control_by_key(name, makers, open_page, tmp_path, monkeypatch):
    """Sentence, code and picture are those of an explorer in the state that the code names."""
    monkeypatch.setattr(playable, "MOST", MOST)
    explorer = makers[name]()
    saved = explorer.save_html(tmp_path / "page.html", progress=False)
    assert saved.states <= MOST and saved.nbytes <= playable.LIMIT
    page = open_page(saved.path)
    picture = page.locator(".qlora-pane canvas")
    expect(picture).to_have_attribute("aria-label", explorer.summary())
    assert page.locator(FOCUSABLE).count() > len(saved.stops)  # Reset, too
    for control in page.locator(f"{EXPLORERS} {FOCUSABLE}").all():
        if control.evaluate(KIND) == "button":
            continue
        before = picture.get_attribute("aria-label")
        by_key(control)
        expect(picture).not_to_have_attribute("aria-label", before)
        as_in_a_kernel(page, explorer)
    page.get_by_role("button", name="Reset", exact=True).press("Enter")
    expect(picture).to_have_attribute("aria-label", makers[name]().summary())


@pytest.mark.parametrize("name", ["MidpointExplorer", "PageTableExplorer"])
def test_play_goes_through_the_stops_of_the_page(name, makers, open_page, tmp_path, monkeypatch):
    monkeypatch.setattr(playable, "MOST", MOST)
    explorer = makers[name]()
    saved = explorer.save_html(tmp_path / "page.html", progress=False)
    last = saved.stops[explorer.played][0] - 1
    page = open_page(saved.path)
    slider = page.get_by_role("slider", name=explorer._controls[explorer.played].description, exact=True)
    play, pause = (page.get_by_role("button", name=word, exact=True) for word in ("Play", "Pause"))
    slider.press("End")
    slider.press("ArrowLeft")
    page.clock.install(time=0)
    page.clock.pause_at(1000)  # from here on time passes where the test says so
    play.press("Enter")
    expect(slider).to_have_value(str(last))
    page.clock.run_for(PACE)
    expect(play).to_be_visible()  # at the end
    play.press("Enter")
    expect(slider).to_have_value("0")  # from the end to the start
    page.clock.run_for(PACE)
    expect(slider).to_have_value("1")  # and on, by its clock
    as_in_a_kernel(page, explorer)
    expect(pause).to_be_visible()
    page.get_by_role("slider").first.press("ArrowRight")
    expect(play).to_be_visible()  # any other control stops it
    slider.press("Home")
    page.emulate_media(reduced_motion="reduce")
    page.get_by_role("button", name="Step", exact=True).press("Enter")
    page.clock.run_for(3 * PACE)
    expect(slider).to_have_value("1")
    as_in_a_kernel(page, explorer)


def as_in_a_kernel(page, explorer):
    code = ast.parse(page.locator(".qlora-pane code").inner_text(), mode="eval").body
    explorer.set(**{part.arg: ast.literal_eval(part.value) for part in code.keywords})
    canvas = page.locator(".qlora-pane canvas")
    line, _, more = explorer.summary().partition(IN_DETAIL)
    assert canvas.get_attribute("aria-label") == explorer.summary()
    assert page.locator(".said").inner_text() == line
    details = page.locator(".qlora-pane details")
    assert details.is_visible() == bool(more) and details.locator("div").text_content() == more
    pictures = base64.b64decode(canvas.evaluate(SHOWN)), explorer.png
    shown, wanted = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int) for png in pictures)
    away = np.abs(shown - wanted)
    assert away.max() <= FAR and away.mean() < 2, (away.max(), away.mean())


def test_a_control_too_many_sends_the_first_one_back(open_page, tmp_path, monkeypatch):
    monkeypatch.setattr(playable, "MOST", 40)
    saved = MemoryExplorer(length=8192).save_html(tmp_path / "page.html", progress=False)
    assert saved.together == 1
    page = open_page(saved.path)
    status = page.get_by_role("status")
    page.get_by_role("slider", name="r", exact=True).press("ArrowRight")
    expect(status).to_have_text("")
    page.get_by_role("checkbox", name="Gradient checkpointing").press("Space")
    expect(status).to_have_text("One control at a time: r went back to where this page began.")
    code = page.locator(".qlora-pane code")
    expect(code).to_contain_text("r=64, length=8192, rows=1, gradient_checkpointing=False")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_can_be_read_in_both_schemes_and_on_a_narrow_screen(scheme, open_page, tmp_path, monkeypatch):
    monkeypatch.setattr(playable, "MOST", 10)
    page = open_page(MidpointExplorer().save_html(tmp_path / "page.html", progress=False).path)
    page.emulate_media(color_scheme=scheme)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    expect(page.locator("canvas")).to_have_css("filter", "none" if scheme == "light" else DARKER)
    text = page.evaluate(FAINT, "body")
    assert text["seen"] and text["faint"] == []
    page.set_viewport_size({"width": 360, "height": 700})
    assert not page.evaluate(CUT_OFF)


def test_follow_weight_by_key(open_page, tmp_path):
    way = FollowWeight(torch.eye(16), lit="byte")
    page = open_page(way.save_html(tmp_path / "way.html"))
    for name in ("byte", "constant"):
        way.go(name)
        expect(page.locator(".said")).to_have_text(way.summary().partition(": ")[2])
        page.get_by_role("tab", name=name, exact=True).press("ArrowRight")
    assert page.get_by_role("link").count() == 0  # no notebook lies beside the page
    assert len({tab.bounding_box()["y"] for tab in page.get_by_role("tab").all()}) == 1  # one row, as in a notebook
    page.get_by_role("tab", name="gradient", exact=True).click()
    chosen, play = page.locator('[aria-selected="true"]'), page.get_by_role("button", name="Play", exact=True)
    page.clock.install(time=0)
    page.clock.pause_at(1000)
    play.press("Enter")
    expect(chosen).to_have_text("page")
    page.clock.run_for(STATION)
    play.press("Enter")  # at the end it has stopped
    for station in ("weight", "block", "scaled"):
        expect(chosen).to_have_text(station)
        page.clock.run_for(STATION)


def test_a_page_in_a_frame_of_the_site(open_page, tmp_path, monkeypatch):
    """Its height, its colours, and a link to another notebook, as docs/static/site.js arranges them."""
    monkeypatch.setattr(playable, "MOST", 10)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "03_block_size.html").write_text("<!doctype html><title>three</title>", "utf-8")
    MidpointExplorer().save_html(tmp_path / "midpoint.html", progress=False)
    FollowWeight(torch.eye(16), lit="block").save_html(tmp_path / "way.html")
    frames = "".join(f'<iframe class="qlora-playable" src="../{name}.html"></iframe>' for name in ("midpoint", "way"))
    script = f"<script>{(ROOT / 'docs' / 'static' / 'site.js').read_text('utf-8')}</script>"
    text = f'<!doctype html><html data-theme="dark"><title>one</title>{script}{frames}</html>'
    outer = tmp_path / "notebooks" / "01_codebook.html"
    outer.write_text(text, "utf-8")
    page = open_page(outer)
    way = page.frame_locator("iframe").nth(1)
    expect(way.get_by_role("tab", name="block", exact=True)).to_be_visible()
    body = page.frame_locator("iframe").first.locator("body")
    expect(body).to_have_css("background-color", "rgb(18, 18, 18)")
    expect(body.locator("canvas")).to_have_css("filter", DARKER)
    page.evaluate("document.documentElement.dataset.theme = 'light'")
    expect(body).to_have_css("background-color", "rgb(255, 255, 255)")
    expect(body.locator("canvas")).to_have_css("filter", "none")
    expect(body.locator(".said")).to_have_text(MidpointExplorer().summary())
    high, inside = page.locator("iframe").first.bounding_box()["height"], body.bounding_box()["height"]
    assert inside <= high < inside + 20  # no bar to scroll
    way.get_by_role("link", name="03_block_size").click()
    expect(page).to_have_title("three")
