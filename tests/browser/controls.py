"""Every control that a page has, found on the page: each is moved by key and by mouse, and its picture follows."""

import base64
import io

import numpy as np
from PIL import Image

BYTES = """async (image) => {
  const blob = await (await fetch(image.src)).blob();
  return new Promise((resolve) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.split(",")[1]);
    reader.readAsDataURL(blob);
  });
}"""
NEW_PICTURE_MS = 10_000  # a redraw takes 50; this is a machine that does something else
# Looked at in each frame: expect() looks again after 100 ms, then after 250, where a redraw takes 50.
SAYS = """async (image, [alt, same, most]) => {
  const end = performance.now() + most;
  while ((image.alt === alt) !== same && performance.now() < end) await new Promise(requestAnimationFrame);
  return image.alt;
}"""
EXPLORERS = ".qlora-explorer"
# a notebook, without asking whether to save it
CLOSE = """async () => {
  const opened = window.jupyterapp.shell.currentWidget;
  await opened.sessionContext.ready;
  await opened.sessionContext.shutdown();
  opened.dispose();
}"""
FOCUSABLE = ":is(input, button, select, textarea, [tabindex], [role=slider]):not(summary)"
KIND = """el => el.getAttribute("role") || (el.tagName === "BUTTON" ? "button" : el.type)"""
NUMBERS = """el => [el.min || el.ariaValueMin, el.value || el.ariaValueNow, el.max || el.ariaValueMax].map(Number)"""


def move_all(lab):
    """Move each control by key and by mouse, from where the explorer was opened; return how many there are.

    The alt text changes each time. The pixels change at least once for each control: a second row of 512 tokens does
    not move the peak of a step, which sixteen rows do.
    """
    count = 0
    for explorer in lab.page.locator(EXPLORERS).all():
        controls = explorer.locator(FOCUSABLE).all()
        buttons = [control for control in controls if control.evaluate(KIND) == "button"]
        others = [control for control in controls if control.evaluate(KIND) != "button"]
        start = explorer.locator("img").get_attribute("alt")
        reset = explorer.get_by_role("button", name="Reset", exact=True)
        for control in [*others, *buttons]:
            drawn = []
            for act in (by_key, by_mouse):
                if control in buttons:
                    follows(explorer, others[-1], by_key)  # away from where the button leads
                drawn.append(follows(explorer, control, act))
                reset.click()
                assert alt_text(explorer.locator("img"), start) == start
            assert any(drawn), f"new alt texts, same pixels: {control.evaluate('el => el.labels?.[0]?.textContent')}"
        count += len(controls)
    return count


def follows(explorer, control, act):
    """The alt text changes; say whether the pixels do."""
    picture = explorer.locator("img")
    alt, before = picture.get_attribute("alt"), pixels(picture).tobytes()
    act(control)
    assert alt_text(picture, alt, same=False) != alt
    return pixels(picture).tobytes() != before


def alt_text(picture, wanted, same=True):
    """The alt text as soon as it is the wanted one, or with same=False another one; after a while, whatever it is."""
    return picture.evaluate(SAYS, [wanted, same, NEW_PICTURE_MS])


def by_key(control):
    kind = control.evaluate(KIND)
    if kind in ("range", "slider"):
        low, now, high = control.evaluate(NUMBERS)
        control.press("ArrowLeft" if high - now < now - low else "ArrowRight")
    else:
        control.press({"checkbox": "Space", "button": "Enter"}[kind])  # KeyError: a new kind needs its key here


def by_mouse(control):
    control.scroll_into_view_if_needed()
    kind = control.evaluate(KIND)
    if kind == "range":
        low, now, high = control.evaluate(NUMBERS)
        box = control.bounding_box()
        control.click(position={"x": box["width"] * (0.03 if now - low > high - now else 0.97), "y": box["height"] / 2})
    elif control.locator("[data-byte]").count():  # a page of bytes
        now, last = int(control.get_attribute("aria-valuenow")), int(control.get_attribute("aria-valuemax"))
        control.locator(f'[data-byte="{last - now}"]').click()
    elif kind == "slider":
        drag(control)
    else:
        control.click()


def drag(handle):
    """Halfway to its neighbour, on the side with more room."""
    low, now, high = handle.evaluate(NUMBERS)
    width = handle.evaluate("el => el.parentElement.querySelector('line').getBoundingClientRect().width")  # of -1 to 1
    way = (low - now if high - now < now - low else high - now) / 2
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + 10
    mouse = handle.page.mouse
    mouse.move(x, y)
    mouse.down()
    mouse.move(x + way * width / 2, y)  # in one step: messages that wait would overtake the reset
    mouse.up()


def pixels(picture):
    """(height, width, 3) uint8: what an <img> of the page shows, before it is scaled."""
    png = base64.b64decode(picture.evaluate(BYTES))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
