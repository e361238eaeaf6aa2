"""What a student sees first: JupyterLab as `qlora-lab open FOLDER` starts it, with its own settings."""

import pytest
from playwright.sync_api import expect

NEWS = "@jupyterlab/apputils-extension:notification"


@pytest.fixture(scope="module")
def page(course_server, context):
    url, token = course_server
    page = context.new_page()
    page.goto(f"{url}lab/tree/01_codebook.ipynb?token={token}")
    page.locator(".jp-OutputArea img").first.wait_for(timeout=60_000)
    yield page
    page.close()


def test_the_file_browser_lists_the_course_in_order_and_the_solutions_last(page):
    items = page.locator(".jp-DirListing-item")
    expect(items.first).to_be_visible(timeout=60_000)
    shown = [(item.bounding_box()["y"], item.inner_text()) for item in items.all()]
    names = [name for _, name in sorted(shown)]
    notebooks = [name for name in names if name.endswith(".ipynb")]
    assert names[: len(notebooks)] == sorted(notebooks) and notebooks[0] == "00_start_here.ipynb"
    assert names[-1] == "solutions"
    texts = page.locator(".jp-DirListing-itemText")
    assert all(texts.evaluate_all("texts => texts.map(text => text.scrollWidth <= text.clientWidth)"))  # none is cut


def test_no_popup_asks_about_news(page):
    """JupyterLab asks as soon as it has read this setting, unless it is "false"."""
    setting = page.evaluate(f"() => fetch('/lab/api/settings/{NEWS}').then(answer => answer.json())")
    assert setting["settings"].get("fetchNews", setting["schema"]["properties"]["fetchNews"]["default"]) == "false"
    assert page.locator(".Toastify__toast").count() == 0


def test_stored_pictures_have_their_alt_text_before_anything_runs(page):
    """Static figures and the stills of explorers, in a notebook that JupyterLab does not trust yet."""
    pictures = page.locator(".jp-OutputArea img").all()
    assert len(pictures) > 1 and page.locator(".qlora-still img").count() > 0
    for picture in pictures:
        assert (picture.get_attribute("alt") or "").strip()
        assert picture.evaluate("image => image.complete && image.naturalWidth > 100")
