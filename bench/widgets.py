"""How long an explorer takes from a key press to the changed picture, in the real JupyterLab, with its parts.

    .venv/bin/python bench/widgets.py      all explorers of the course: five minutes, on an otherwise idle machine

For each slider of each explorer (of 16 levels the first six) a key is pressed, one press at a time, and these times are
taken on one clock:

    the key's event in the page, the kernel's handler, computed, drawn, encoded, the kernel's message in the page,
    and the frame that shows the picture, decoded

Writes bench/widgets.json. Chromium and JupyterLab run as in the browser tests, without a GPU.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import nbformat
import numpy as np
import torch
from playwright.sync_api import Page, sync_playwright
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.files import write  # noqa: E402
from bench.timing import cpu_name  # noqa: E402
from qlora_lab.data.shapes import shapes_split  # noqa: E402
from qlora_lab.export.parity import Change, Parity  # noqa: E402
from qlora_lab.export.survival import FACTORS, Survival  # noqa: E402
from qlora_lab.export.xray import Checkpoint  # noqa: E402
from qlora_lab.measure.best_plan import Choices  # noqa: E402
from qlora_lab.quant.plan import Candidate  # noqa: E402
from qlora_lab.quant.quantize import quantize  # noqa: E402
from qlora_lab.quant.serialize import to_tensors  # noqa: E402
from qlora_lab.show import figure  # noqa: E402
from qlora_lab.show.block_size import BlockSizeExplorer  # noqa: E402
from qlora_lab.show.seeing import SeeingExplorer  # noqa: E402
from qlora_lab.show.survival import SurvivalExplorer  # noqa: E402
from qlora_lab.show.xray import XrayExplorer  # noqa: E402
from qlora_lab.train.toy_llava import trained_tower  # noqa: E402
from tools.lab_server import FLAGS, IDLE, RUN_ALL, SHUT_DOWN, find_chromium, lab_server  # noqa: E402

JSON = ROOT / "bench" / "widgets.json"
EXPLORERS = {  # class -> what makes it, as its notebook does
    "NormalFloatExplorer": "from qlora_lab.show.normal_float import NormalFloatExplorer as explorer; e = explorer()",
    "BlockSizeExplorer": "from bench.widgets import block_sizes; e = block_sizes()",
    "ConstantsExplorer": "from qlora_lab.show.constants import ConstantsExplorer as explorer; e = explorer()",
    "KernelMapExplorer": "from qlora_lab.show.kernel_map import KernelMapExplorer as explorer; e = explorer()",
    "OutlierExplorer": "from qlora_lab.show.data_types import OutlierExplorer as explorer; e = explorer()",
    "CodebookExplorer": "from qlora_lab.show.data_types import CodebookExplorer as explorer; e = explorer()",
    "LowRankExplorer": "from qlora_lab.show.low_rank import LowRankExplorer as explorer; e = explorer()",
    "MemoryExplorer": "from qlora_lab.show.memory import MemoryExplorer as explorer; e = explorer()",
    "PageTableExplorer": "from qlora_lab.show.page_table import PageTableExplorer as explorer; e = explorer()",
    "MidpointExplorer": "from qlora_lab.show.midpoint import MidpointExplorer as explorer; e = explorer()",
    "ZooExplorer": "from qlora_lab.show.zoo import ZooExplorer as explorer; e = explorer()",
    "TournamentExplorer": "from qlora_lab.show.tournament import TournamentExplorer as explorer; e = explorer()",
    "AnswerSpeedExplorer": "from qlora_lab.show.answers import AnswerSpeedExplorer as explorer; e = explorer()",
    "SurvivalExplorer": "from bench.widgets import merged; e = merged()",
    "SeeingExplorer": "from bench.widgets import seeing; e = seeing()",
    "XrayExplorer": "from bench.widgets import checkpoint_bytes; e = checkpoint_bytes()",
}
PARTS = ["to the kernel", "compute", "draw", "encode", "to the page", "front end"]
PRESSES = 8  # of each control
MOST = 6  # sliders of an explorer: 6 of the 16 levels are enough
PAUSE = 400  # milliseconds between two presses, so that each finds an idle kernel

# Before Lab's own scripts: note when a message of more than 2 kB, which holds a picture, reaches the page.
WATCH_SOCKET = """
const now = () => performance.timeOrigin + performance.now();
window.arrived = [];
window.WebSocket = class extends window.WebSocket {
  constructor(...given) {
    super(...given);
    this.addEventListener("message", ({ data }) => {
      if ((data.byteLength ?? data.size ?? data.length) > 2000) window.arrived.push(now());
    });
  }
};
"""
# Note when a key goes down, and the frame that shows the new picture.
WATCH_PICTURE = """() => {
  const now = () => performance.timeOrigin + performance.now();
  const explorer = document.querySelector(".qlora-explorer");
  window.shown = [];
  explorer.addEventListener("keydown", (event) => { window.pressed = performance.timeOrigin + event.timeStamp; }, true);
  new MutationObserver(async () => {
    const image = explorer.querySelector("img");
    if (image === window.last?.image && image.src === window.last.src) return;
    window.last = { image, src: image.src };
    await image.decode();
    requestAnimationFrame(() => window.shown.push(now()));
  }).observe(explorer, { subtree: true, childList: true, attributes: true, attributeFilter: ["src"] });
}"""
ASK_KERNEL = """async (code) => {
  const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
  const request = kernel.requestExecute({ code });
  let text = "";
  request.onIOPub = ({ content }) => { text += content.text ?? ""; };
  await request.done;
  return text;
}"""


def smollm2_layers() -> tuple[str, ...]:
    parts = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"]
    return tuple(f"model.layers.{i}.{part}_proj" for i in range(30) for part in parts)


def block_sizes():
    """The explorer of notebook 03, of a model with SmolLM2-135M's 210 layers and errors drawn from a seed."""
    layers = smollm2_layers()
    candidates = tuple(Candidate("nf4", size, True) for size in (32, 64, 128, 256))
    bits = np.array([[2**16 * (4 + 8 / c.block_size) for c in candidates]] * len(layers))
    error = np.random.default_rng(0).lognormal(size=(len(layers), 1)) * np.array([5.0, 6, 7, 8])
    return BlockSizeExplorer(Choices(layers, (2**16,) * len(layers), candidates, error, bits))


def merged():
    """The explorer of notebook 13, of a model with as many layers and changes that are made up."""
    layers, reports = smollm2_layers(), {}
    for factor in FACTORS:
        left = factor / (8 + factor)
        changes = dict.fromkeys(layers, Change(left, left / 2))
        kl = 0.1 * factor**2
        reports[factor] = Parity("requantised", kl * (1 - left), kl, 0.9, 18.0, 19.0, 192, 0.05, changes)
    return SurvivalExplorer(Survival(dict.fromkeys(layers, 0.01), reports))


def seeing():
    """The explorer of notebook 14, of a tower that is hardly trained."""
    return SeeingExplorer(trained_tower(shapes_split(8, 4).train, 2, progress=False))


def checkpoint_bytes():
    """The explorer of notebook 02, of one layer in 4 bits with double quantization."""
    weight = torch.randn(576, 576, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as home:
        file = Path(home) / "layer.safetensors"
        save_file(to_tensors(quantize(weight, double_quant=True), "model.layers.0.self_attn.q_proj.weight"), file)
        return XrayExplorer(Checkpoint(file))


def watched(explorer):
    """Note, in `explorer.times`, when each redraw started, had computed, had drawn, had encoded (ms since 1970)."""
    explorer.times = []
    compute = explorer.compute
    png_bytes = figure.png_bytes

    def timed_compute(state):
        start = time.time()
        result = compute(state)
        explorer.times.append([1e3 * start, 1e3 * time.time()])
        return result

    def timed_png_bytes(rgba):
        explorer.times[-1].append(1e3 * time.time())
        png = png_bytes(rgba)
        explorer.times[-1].append(1e3 * time.time())
        return png

    explorer.compute = timed_compute
    figure.png_bytes = timed_png_bytes
    return explorer


def measure(page: Page) -> dict:
    """Press keys on the explorer's sliders: ms of the whole (median, quartiles, worst) and the median of each part."""
    page.evaluate(WATCH_PICTURE)
    rows = []
    for slider in page.locator(".qlora-explorer").get_by_role("slider").all()[:MOST]:
        keys = ["ArrowRight", "ArrowLeft"] * (PRESSES // 2)
        if slider.get_attribute("aria-valuenow") == slider.get_attribute("aria-valuemax"):
            keys.reverse()
        slider.focus()
        for key in keys:
            rows.append(one_press(page, key))
    kept = [row for row in rows if row]
    parts = {part: statistics.median(row[part] for row in kept) for part in PARTS}
    whole = [sum(row.values()) for row in kept]
    low, median, high = statistics.quantiles(whole, n=4)
    return {"median": median, "low": low, "high": high, "worst": max(whole), "presses": len(kept), "parts": parts}


def one_press(page: Page, key: str) -> dict | None:
    """ms of each part of one key press; None if the picture stayed, as at the end of a slider."""
    page.evaluate("() => { window.shown.length = 0; window.arrived.length = 0; }")
    page.keyboard.press(key)
    page.wait_for_timeout(PAUSE)
    pressed, arrived, shown = page.evaluate("() => [window.pressed, window.arrived, window.shown]")
    times = json.loads(page.evaluate(ASK_KERNEL, "import json; print(json.dumps(e.times)); e.times.clear()"))
    if not (shown and arrived and times):
        return None
    stamps = [pressed, *times[-1], arrived[0], shown[-1]]
    return dict(zip(PARTS, (b - a for a, b in zip(stamps, stamps[1:], strict=False)), strict=True))


def run(chromium: str, home: Path) -> dict[str, dict]:
    os.environ["PYTHONPATH"] = str(ROOT)
    with lab_server(home) as (address, token, served), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        results = {}
        for name, source in EXPLORERS.items():
            cells = [source, "from bench.widgets import watched; watched(e)"]
            write_notebook(served / f"{name}.ipynb", cells)
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.add_init_script(WATCH_SOCKET)
            page.goto(f"{address}lab/tree/{name}.ipynb?token={token}&reset")
            page.wait_for_function(IDLE, timeout=60_000)
            assert page.evaluate(RUN_ALL), page.locator(".jp-OutputArea-output").all_inner_texts()
            page.locator(".qlora-explorer img").wait_for()
            page.wait_for_timeout(PAUSE)
            results[name] = measure(page)
            print(line(name, results[name]), flush=True)
            page.evaluate(SHUT_DOWN)
            page.close()
        browser.close()
    return results


def write_notebook(path: Path, cells: list[str]) -> None:
    kernel = {"kernelspec": {"display_name": "Python 3", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(metadata=kernel, cells=list(map(nbformat.v4.new_code_cell, cells))), path)


def line(name: str, result: dict) -> str:
    parts = "  ".join(f"{part} {ms:.0f}" for part, ms in result["parts"].items())
    return f"{name:20}{result['median']:5.0f} ms (worst {result['worst']:.0f} of {result['presses']}): {parts}"


def main() -> int:
    chromium = find_chromium()
    if chromium is None:
        print("Chromium is not installed: sudo apt-get install chromium", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as home:
        explorers = run(chromium, Path(home))
    median = statistics.median(result["median"] for result in explorers.values())
    print(f"median explorer: {median:.0f} ms")
    machine = {"processor": cpu_name(), "date": date.today().isoformat()}
    versions = {name: version(name) for name in ("jupyterlab", "ipywidgets", "anywidget", "matplotlib", "pillow")}
    result = {**machine, "versions": versions, "unit": "ms", "median_explorer": median, "explorers": explorers}
    write(JSON, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
