"""Follow one weight in the real JupyterLab: moved by keys and by mouse, read aloud, in both themes, on the next day."""

import nbformat
import pytest
from playwright.sync_api import expect

from qlora_lab.show.weight_stations import STATIONS
from tests.browser.controls import CLOSE
from tests.browser.theme import DARK, LIGHT, resize, set_theme, unreadable
from tools.lab_server import SHUT_DOWN

KERNEL = {"kernelspec": {"display_name": "Python 3", "name": "python3"}}
CELLS = ["import qlora_lab as ql", "followed = ql.FollowWeight()\nfollowed", "followed"]
NAMES = [station.name for station in STATIONS]
AT = "(dot) => { const box = dot.getBoundingClientRect(); return [box.x, box.y].map(Math.round).join() }"
STILL = """() => { document.getAnimations().forEach((one) => one.finish()) }"""
LINKED = """() => {
  const context = window.jupyterapp.shell.currentWidget?.context;
  return context?.path.endsWith("/04_double_quant.ipynb") && context.isReady;
}"""
RUN_LAST = """async () => {
  window.jupyterapp.shell.currentWidget.content.activeCellIndex = 2;
  await window.jupyterapp.commands.execute("notebook:run-cell");
}"""
SMALLEST = """() => Math.min(...[...document.querySelectorAll(".qlora-way svg text")].map((text) =>
  parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a))"""
GROUND = """async (img) => {
  await img.decode();
  const canvas = new OffscreenCanvas(1, 1).getContext("2d");
  canvas.drawImage(img, 0, 0);
  return [...canvas.getImageData(0, 0, 1, 1).data].join();
}"""


@pytest.fixture(scope="module")
def lab(open_notebook, tmp_path_factory):
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    linked = tmp_path_factory.mktemp("linked") / "04_double_quant.ipynb"
    nbformat.write(nbformat.v4.new_notebook(metadata=KERNEL), linked)
    path = tmp_path_factory.mktemp("follow") / "follow.ipynb"
    nbformat.write(nbformat.v4.new_notebook(metadata=KERNEL, cells=cells), path)
    lab = open_notebook(path, linked)
    expect(way(lab).get_by_role("tab")).to_have_count(len(NAMES))
    yield lab
    set_theme(lab.page, LIGHT)
    lab.page.evaluate(SHUT_DOWN)


def way(lab):
    return lab.page.locator(".qlora-way").first


def tab(lab, name):
    return way(lab).get_by_role("tab", name=name, exact=True)


def shown(lab):
    """What the panel has: title, sentence, drawing."""
    panel = way(lab).get_by_role("tabpanel")
    return (
        panel.locator(".title").inner_text(),
        panel.locator(".said").inner_text(),
        panel.locator(".parts").inner_html(),
    )


def expect_chosen(lab, name):
    expect(tab(lab, name)).to_have_attribute("aria-selected", "true")
    expect(way(lab).locator('[role="tab"][tabindex="0"]')).to_have_text(name)  # one stop of the Tab key


def test_keys_go_from_station_to_station(lab):
    tab(lab, "weight").click()
    seen = [shown(lab)]
    for before, name in zip(NAMES, NAMES[1:], strict=False):
        tab(lab, before).press("ArrowRight")
        expect(tab(lab, name)).to_be_focused()
        expect_chosen(lab, name)
        seen.append(shown(lab))
    for part in zip(*seen, strict=True):
        assert len(set(part)) == len(NAMES)  # each station has a title, a sentence and a drawing of its own
    tab(lab, NAMES[-1]).press("ArrowRight")
    expect_chosen(lab, NAMES[-1])  # the way has an end
    for key, name in [("Home", NAMES[0]), ("ArrowLeft", NAMES[0]), ("End", NAMES[-1]), ("ArrowLeft", NAMES[-2])]:
        lab.page.keyboard.press(key)
        expect_chosen(lab, name)
    for key, name in (("Enter", "byte"), ("Space", "code")):
        tab(lab, name).press(key)
        expect_chosen(lab, name)
    lab.page.keyboard.press("b")  # JupyterLab would insert a cell
    expect(lab.page.locator(".jp-Cell")).to_have_count(len(CELLS))  # no key has reached JupyterLab


def test_the_kernel_hears_which_station_is_shown(lab):
    tab(lab, "error").click()
    expect(way(lab).locator("xpath=..").get_by_role("status")).to_be_hidden()  # nothing was refused
    lab.page.evaluate(RUN_LAST)
    expect(way(lab).get_by_role("tab")).to_have_count(len(NAMES))
    expect(lab.page.locator(".qlora-way").nth(1).locator('[aria-selected="true"]')).to_have_text("error")


def test_play_goes_from_station_to_station_until_the_reader_does(lab):
    play, pause, step = (way(lab).get_by_role("button", name=word, exact=True) for word in ("Play", "Pause", "Step"))
    tab(lab, "decoded").click()
    play.press("Enter")
    for name in ("error", "product"):  # at once, and three seconds later
        expect(tab(lab, name)).to_have_attribute("aria-selected", "true", timeout=10_000)
    expect(pause).to_be_focused()  # it takes the reader nowhere
    tab(lab, "block").click()
    expect(play).to_be_visible()
    lab.page.emulate_media(reduced_motion="reduce")
    step.press("Enter")
    expect_chosen(lab, "scaled")
    lab.page.wait_for_timeout(3500)  # more than its pace
    expect_chosen(lab, "scaled")
    lab.page.emulate_media(reduced_motion="no-preference")


def test_the_dot_rides_and_respects_those_who_want_no_motion(lab):
    dot = way(lab).locator(".dot")
    places = set()
    for name in ("weight", "code", "page"):
        tab(lab, name).click()
        lab.page.evaluate(STILL)
        places.add(dot.evaluate(AT))
    assert len(places) == 3
    duration = "(dot) => getComputedStyle(dot).transitionDuration"
    for motion, seconds in (("no-preference", "0.25s"), ("reduce", "0s")):
        lab.page.emulate_media(reduced_motion=motion)
        assert dot.evaluate(duration) == seconds
    lab.page.emulate_media(reduced_motion="no-preference")


def test_every_station_is_readable_in_both_themes_and_in_a_narrow_window(lab, tmp_path):
    for theme in (DARK, LIGHT):
        set_theme(lab.page, theme)
        for width in (600, 1280):
            resize(lab.page, width)
            for name in NAMES:
                tab(lab, name).click()
                lab.page.evaluate(STILL)
                assert unreadable(lab.page) == [], (theme, width, name)
                if width == 1280:
                    assert lab.page.evaluate(SMALLEST) >= 12, name
                    way(lab).screenshot(path=tmp_path / f"{theme.split()[1]}-{name}.png")


def test_a_link_opens_the_notebook_of_the_station(lab):
    """In JupyterLab, beside this one, without loading the page anew."""
    tab(lab, "constant").click()
    lab.page.evaluate("() => { window.stays = true }")
    way(lab).get_by_role("link", name="04_double_quant").click()
    lab.page.wait_for_function(LINKED)
    assert lab.page.evaluate("window.stays")
    lab.page.evaluate(CLOSE)
    expect(tab(lab, "constant")).to_be_visible()


def test_one_picture_and_all_sentences_stay_on_the_next_day(lab):
    """Last: it saves, shuts down and opens again."""
    lab.reopen()
    lab.expect_stills_alone(2)
    picture = lab.page.locator(".jp-OutputArea img").first
    assert picture.get_attribute("alt").startswith("Station 1 of 14, weight: ")
    lab.page.get_by_text("All stations").first.click()
    expect(lab.page.locator(".qlora-still").first.locator("li:visible")).to_have_count(len(NAMES))
    for theme, ground in ((DARK, "17,17,17,255"), (LIGHT, "255,255,255,255")):
        set_theme(lab.page, theme)
        assert picture.evaluate(GROUND) == ground
