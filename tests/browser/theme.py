"""What the page looks like: its theme, its width, the contrast of its text, and whether anything is cut off."""

import base64
from pathlib import Path

LIGHT, DARK = "JupyterLab Light", "JupyterLab Dark"
CHANGE = """async (theme) => {
  await window.jupyterapp.commands.execute("apputils:change-theme", { theme });
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
}"""
NO_SPLASH = "() => !document.getElementById('jupyterlab-splash')"
THEME = "theme => document.body.dataset.jpThemeName === theme"
# Each visible text below 4.5 : 1 (WCAG 2.2, 1.4.3) with what it has. Colours may be see-through: they are laid over
# each other from the first opaque background on, and `opacity` of any parent counts. Left out are JupyterLab's colours
# of code in Markdown, which has brackets at 2.9 : 1, and what is switched off.
FAINT = """(places) => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below, alpha) => top.slice(0, 3).map((c, i) => alpha * c + (1 - alpha) * below[i]);
  const parents = (el) => { const all = []; for (; el; el = el.parentElement) all.push(el); return all; };
  const ground = (el) => {
    const layers = parents(el).map((p) => rgba(getComputedStyle(p).backgroundColor));
    const opaque = layers.findIndex((layer) => layer[3] === 1);
    const seen = opaque < 0 ? [...layers, [255, 255, 255, 1]] : layers.slice(0, opaque + 1);
    return seen.reverse().reduce((below, layer) => over(layer, below, layer[3]), [255, 255, 255]);
  };
  const light = (colour) => {
    const [r, g, b] = colour.map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const faint = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (texts.nextNode()) {
    const text = texts.currentNode.data.trim(), el = texts.currentNode.parentElement;
    const left_out = !el.closest(places) || el.closest("[inert], .jp-RenderedMarkdown pre");
    if (!text || left_out || !el.checkVisibility()) continue;
    const below = ground(el), ink = rgba(getComputedStyle(el).color);
    const alpha = parents(el).reduce((product, p) => product * getComputedStyle(p).opacity, ink[3]);
    const [a, b] = [light(over(ink, below, alpha)), light(below)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    seen += 1;
    if (ratio < 4.5) faint.push(`${ratio.toFixed(2)} ${text.slice(0, 60)}`);
  }
  return { seen, faint };
}"""
# The colour in the corner of each visible picture, where it is wrong: white, and in a dark theme dark. A PNG is drawn
# in black on white and the page's filter turns it; an SVG has a ground of its own. From a notebook that is not trusted
# JupyterLab removes the <style> with the filter.
CORNERS = """(places) => [...document.querySelectorAll(places)].filter((img) => img.checkVisibility()).map((img) => {
  const turned = img.src.startsWith("data:image/svg") || img.closest(".qlora-pane") || img.previousElementSibling;
  const dark = turned && document.body.dataset.jpThemeLight === "false";
  const canvas = new OffscreenCanvas(img.naturalWidth, img.naturalHeight).getContext("2d");
  canvas.filter = getComputedStyle(img).filter;
  canvas.drawImage(img, 0, 0);
  const corner = canvas.getImageData(0, 0, 1, 1).data;
  const right = dark ? corner[0] < 32 : corner[0] === 255;
  return right && new Set(corner.slice(0, 3)).size === 1 && corner[3] === 255 ? "" : corner.join();
}).filter(Boolean)"""
# What is wider than its place: its end is cut off, or a bar to scroll appears. Code has such a bar on purpose, and so
# has a picture whose text would be too small to read.
WIDE = """(places) => [...document.querySelectorAll(places)].flatMap((place) => {
  const edge = place.getBoundingClientRect().right + 1;
  return [...place.querySelectorAll("*")].filter((el) => el.checkVisibility() && !el.closest("pre, .qlora-picture *")
    && (el.getBoundingClientRect().right > edge)).map((el) => el.outerHTML.slice(0, 80));
})"""
OUTPUTS = ".jp-OutputArea-output"
OURS = ".qlora-explorer, .qlora-live, .qlora-still"  # bars of tqdm are wider
LAID_OUT = """(width) => {
  const gap = width - document.querySelector(".jp-WindowedPanel-outer").getBoundingClientRect().right;
  return gap > 0 && gap < 60;  // JupyterLab's right bar has 33 pixels
}"""


def set_theme(page, theme):
    """JupyterLab's splash covers the change. A second change before it is gone would remove it twice: an error."""
    page.evaluate(CHANGE, theme)
    page.wait_for_function(THEME, arg=theme)
    page.wait_for_function(NO_SPLASH)


def resize(page, width):
    """Give the window a width, in pixels. JupyterLab lays its panels out a moment later."""
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_function(LAID_OUT, arg=width)


def unreadable(page, places=OUTPUTS):
    """Faults: text without contrast, a picture without its ground, things wider than their place."""
    text = page.evaluate(FAINT, places)
    nothing = [] if text["seen"] else [f"no text in {places}"]
    grounds = {f"a picture on {ground}" for ground in page.evaluate(CORNERS, f"{places} img")}
    return nothing + text["faint"] + sorted(grounds) + page.evaluate(WIDE, OURS)


# ------------------------------------------------------------------------------------------------ pictures for people

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"  # an ignored folder; each run replaces them
TALLEST = 12_000  # pixels of a picture: Chromium draws up to 16,000, and each thousand takes time
CHANGED = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
LENGTH = "() => document.querySelector('.jp-WindowedPanel-outer').scrollHeight"


def keep_pictures(page, name):
    """Keep what the notebook on the page looks like, in the theme that it has: as it is, and at 200 % zoom.

    No test compares them: they are for people who look through a course, from its first cell as far as TALLEST goes.
    """
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    session = page.context.new_cdp_session(page)
    for zoom in (1, 2):
        # a browser's zoom of 2 is a window of half the size in which a pixel of CSS is two of the screen
        width, kind = 1280 // zoom, "dark" if zoom == 1 else "dark-200"
        height = min(page.evaluate(LENGTH) + 100, TALLEST // zoom)
        metrics = {"width": width, "height": height, "deviceScaleFactor": zoom, "mobile": False}
        session.send("Emulation.setDeviceMetricsOverride", metrics)
        page.evaluate(CHANGED)
        # not page.screenshot(), which would set the window back first
        taken = session.send("Page.captureScreenshot", {"format": "jpeg", "quality": 60})
        (SCREENSHOTS / f"{name}-{kind}.jpg").write_bytes(base64.b64decode(taken["data"]))
    session.send("Emulation.clearDeviceMetricsOverride")
    session.detach()
