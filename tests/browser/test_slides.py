"""The slides in a browser, from disk: keys, notes, the reload that stays, and that nothing is cut off or fetched."""

import pytest

from tools import slides

SEEN = "() => [...document.querySelectorAll('section')].filter((s) => s.checkVisibility()).map((s) => s.id).join()"
# Of the slide in sight: how far its foot, and the widest thing in it, stand out of the window.
OUT = """() => {
  const now = document.querySelector("section.now");
  const seen = [...now.querySelectorAll(":scope > :not(aside), :scope > div *")];
  const edges = seen.map((el) => el.getBoundingClientRect());
  return [Math.max(...edges.map((e) => e.bottom - innerHeight)), Math.max(...edges.map((e) => e.right - innerWidth))];
}"""


def wait_for(deck, number):
    """Wait until a slide is in sight: the browser tells of a new address a moment after the key."""
    deck.wait_for_function(f"number => ({SEEN})() === `${{number}}`", arg=number)


@pytest.fixture(scope="module")
def deck(context, tmp_path_factory):
    path = tmp_path_factory.mktemp("slides") / "slides.html"
    slides.main(["--out", str(path)])
    page = context.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.set_viewport_size({"width": 1280, "height": 720})
    page.goto(path.as_uri())
    yield page
    page.close()
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize("size", [(1280, 720), (1024, 768)])
def test_every_slide_fits_its_window(deck, size):
    deck.set_viewport_size({"width": size[0], "height": size[1]})
    deck.keyboard.press("Home")
    for number in range(1, 13):
        wait_for(deck, number)
        assert max(deck.evaluate(OUT)) <= 1, f"slide {number}"
        deck.keyboard.press("ArrowRight")
    assert deck.evaluate(SEEN) == "12"  # the last stays


def test_keys_go_both_ways_and_a_reload_stays(deck):
    deck.keyboard.press("Home")
    wait_for(deck, 1)
    keys = {"PageDown": 2, " ": 3, "ArrowLeft": 2, "ArrowRight": 3, "Shift+ ": 2, "End": 12, "PageUp": 11}
    for key, number in keys.items():
        deck.keyboard.press(key)
        wait_for(deck, number)
    deck.reload()
    assert deck.evaluate(SEEN) == "11" and deck.title() == "Play with every byte"


def test_n_shows_the_answer_and_hides_it_again(deck):
    deck.keyboard.press("End")
    deck.keyboard.press("ArrowLeft")
    answer = deck.locator("section.now aside").get_by_text("The answer is").first
    for seen in (False, True, False):
        assert answer.is_visible() == seen
        deck.keyboard.press("n")
    deck.keyboard.press("n")


def test_long_notes_are_scrolled_and_the_slide_stays(deck):
    deck.set_viewport_size({"width": 1280, "height": 300})
    deck.keyboard.press("End")
    wait_for(deck, 12)
    deck.keyboard.press("n")
    deck.keyboard.press("ArrowDown")
    deck.wait_for_function("scrollY > 0")
    assert deck.evaluate(SEEN) == "12"
    deck.keyboard.press("n")
    deck.set_viewport_size({"width": 1280, "height": 720})


def test_a_print_has_a_page_for_each_slide(deck):
    assert deck.pdf(prefer_css_page_size=True).count(b"/Type /Page\n") == 12
