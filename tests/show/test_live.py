"""The live run: the same numbers as without, every way to end it, what a notebook keeps; once in a real kernel."""

import asyncio
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from jupyter_client.manager import start_new_kernel
from toy_training import EXAMPLES, toy_training

from qlora_lab.adapters.lora import adapters
from qlora_lab.show import live as module
from qlora_lab.show.figure import png_bytes
from qlora_lab.show.live import LivePlot, live
from qlora_lab.train.checkpoint import saved_steps
from tools.notebooks import execute, normalise, text_of

pytestmark = pytest.mark.usefixtures("one_thread")
PNG = png_bytes(np.zeros((1, 1, 4), np.uint8))


@pytest.fixture
def no_pixels(monkeypatch):
    """A full draw takes 0.2 s."""
    monkeypatch.setattr(module.Blit, "frame", lambda blit: PNG)


@pytest.fixture
def notebook(monkeypatch):
    """A kernel that records what is shown, stored and sent; `handled` are the widgets' messages it has served."""
    shown, stored, sent, handled = [], [], [], []

    def display(one):
        shown.append(one)
        stored.append(one._repr_mimebundle_())

    kernel = SimpleNamespace(
        shell_handlers={"comm_msg": lambda stream, ident, message: handled.append(message)},
        get_parent=lambda channel: "cell",
        session=SimpleNamespace(send=lambda _, kind, content, parent: sent.append((*content.values(), parent))),
        iopub_socket=None,
    )
    monkeypatch.setattr(module, "_notebook", lambda: (kernel, display))
    return SimpleNamespace(kernel=kernel, shown=shown, stored=stored, sent=sent, handled=handled)


async def beside(training, act):
    """The run, and act() as soon as three steps are made: what a key press in a notebook does."""

    async def later():
        while len(getattr(training, "lines", ())) < 3:
            await asyncio.sleep(0)
        act()

    other = asyncio.create_task(later())
    run = await live(training)
    await other
    return run


@pytest.mark.long
def test_a_plain_process_just_trains(tmp_path, capsys):
    want = toy_training(tmp_path / "a").run()
    got = asyncio.run(live(toy_training(tmp_path / "b")))
    assert got.losses == want.losses and got.ended == "all steps"
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_watching_changes_no_number_and_leaves_one_picture(notebook, tmp_path):
    options = {"steps": 12, "eval_every": 4, "held_out": EXAMPLES[:2]}
    run = asyncio.run(live(toy_training(tmp_path / "a", **options)))
    assert run.losses == toy_training(tmp_path / "b", **options).run().losses
    panel, picture = notebook.shown
    assert panel.training.progress is False
    assert notebook.stored[0]["text/plain"] == repr(panel) == "training: 12 steps of 4 examples"
    assert sorted(notebook.stored[1]) == ["text/html", "text/plain"]
    first, last = np.mean(run.losses[:10]), np.mean(run.losses[-10:])
    step, best = min(run.held_out, key=lambda one: one[1])
    assert picture.alt == (
        f"Training loss over 12 of 12 steps: mean of the first 10 {first:.2f}, of the last 10 {last:.2f}; "
        f"lowest held-out loss {best:.2f} at step {step}. Ended: all steps"
    )
    asyncio.run(live(toy_training(tmp_path / "c", **options)))
    assert notebook.stored[3] == notebook.stored[1]  # a second run leaves no difference in a stored notebook


@pytest.mark.slow
def test_the_curves_are_the_log(tmp_path):
    training = toy_training(tmp_path / "run", steps=40, group_by_length=True, eval_every=20, held_out=EXAMPLES[:2])
    plot = LivePlot(training)
    for line in training:
        plot.follow()
        if line["step"] == 1:
            assert "step 1 of 40, loss " in plot._text.value and "tokens per second" in plot._text.value
            assert plot._pane.alt.startswith("Training loss over 1 of 40 steps: ")
            assert np.ptp(plot.left.get_ylim()) > 0.01  # it was 1e-12, with ticks such as 1e-13 + 3.997
    plot.redraw()
    lines = training.lines
    assert plot.points.get_ydata() == [line["loss"] for line in lines]
    assert plot.lengths.get_ydata() == [line["mean_length"] for line in lines]
    assert len(set(plot.lengths.get_ydata())) > 1  # the saw is there to be seen
    assert plot.held.get_xdata() == [20, 40]
    assert plot.mean.get_ydata()[-1] == pytest.approx(np.mean([line["loss"] for line in lines[-10:]]))
    low, high = plot.left.get_ylim()
    assert low <= min(plot.points.get_ydata()) and max(plot.points.get_ydata()) <= high
    assert plot.left.get_xlim()[1] == 41


@pytest.mark.long
@pytest.mark.usefixtures("no_pixels")
def test_it_redraws_at_most_now_and_then(notebook, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "REDRAW_EVERY", 1e9)
    drawn, redraw = [], LivePlot.redraw
    monkeypatch.setattr(LivePlot, "redraw", lambda plot: (drawn.append(len(plot.lines)), redraw(plot)))
    asyncio.run(live(toy_training(tmp_path / "run")))
    assert drawn == [1, 6]  # the first step, and the picture that stays


@pytest.mark.long
@pytest.mark.usefixtures("no_pixels")
def test_the_button_ends_the_run_after_the_step_and_it_can_be_resumed(notebook, tmp_path):
    whole = toy_training(tmp_path / "whole").run()
    training = toy_training(tmp_path / "run")
    run = asyncio.run(beside(training, lambda: notebook.shown[0].button.set_state({"clicks": 1})))
    assert (run.ended, run.losses) == ("asked to stop", whole.losses[:3])
    assert "Ended: asked to stop; resume=True goes on</div>" in notebook.stored[1]["text/html"]  # seen, not only read
    rest = asyncio.run(live(toy_training(tmp_path / "run", resume=True)))
    assert rest.ended == "all steps" and rest.losses == whole.losses
    assert notebook.shown[3].alt.startswith("Training loss over 6 of 6 steps")  # the resumed run shows all of it


@pytest.mark.long
@pytest.mark.usefixtures("no_pixels")
def test_an_interrupt_ends_the_step_saves_and_is_a_keyboard_interrupt(notebook, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    training = toy_training(tmp_path / "run")
    with pytest.raises(
        KeyboardInterrupt, match=r"after step 3 of 6, all of it saved in .*run: continue with resume=True"
    ):
        asyncio.run(beside(training, lambda: signal.raise_signal(signal.SIGINT)))
    assert saved_steps(tmp_path / "run") == [3]
    assert signal.getsignal(signal.SIGINT) is before
    assert "Training loss over 3 of 6 steps" in notebook.shown[1].alt


@pytest.mark.usefixtures("no_pixels")
def test_a_cancelled_run_is_saved(notebook, tmp_path):
    async def give_up():
        task = asyncio.current_task()
        await beside(toy_training(tmp_path / "run"), task.cancel)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(give_up())
    assert saved_steps(tmp_path / "run") == [3]


@pytest.mark.long
@pytest.mark.usefixtures("no_pixels")
def test_an_error_surfaces_under_the_picture_of_what_came_before(notebook, tmp_path):
    training = toy_training(tmp_path / "run")
    spoil = next(iter(adapters(training.model).values())).lora_B.data.fill_
    before = dict(notebook.kernel.shell_handlers)
    with pytest.raises(FloatingPointError, match="^step 4: "):
        asyncio.run(beside(training, lambda: spoil(torch.inf)))
    assert "Training loss over 3 of 6 steps" in notebook.shown[1].alt and "Ended" not in notebook.shown[1].alt
    assert notebook.kernel.shell_handlers == before


@pytest.mark.long
@pytest.mark.usefixtures("no_pixels")
def test_an_error_before_the_first_step_leaves_no_picture(notebook, tmp_path):
    asyncio.run(live(toy_training(tmp_path / "run", steps=2)))
    training = toy_training(tmp_path / "run", overwrite=True)
    next(iter(adapters(training.model).values())).lora_B.data.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="^step 1: "):
        asyncio.run(live(training))
    assert len(notebook.shown) == 3  # panel and picture of the first run, the panel of the second


@pytest.mark.long
@pytest.mark.usefixtures("no_pixels")
def test_the_end_of_a_widgets_message_is_reported_once(notebook, tmp_path):
    handlers = notebook.kernel.shell_handlers

    def messages():
        handlers["comm_msg"](None, None, "moved")
        other = threading.Thread(target=lambda: handlers["comm_msg"](None, None, "in a subshell"))
        other.start()
        other.join()

    asyncio.run(beside(toy_training(tmp_path / "run"), messages))
    assert notebook.handled == ["moved", "in a subshell"]
    assert notebook.sent == [("idle", "moved"), ("busy", "cell")]  # a subshell's thread reports its own


HERE = str(Path(__file__).parent)
SETUP = f"import sys, time; sys.path.insert(0, {HERE!r})\nfrom toy_training import *\nimport qlora_lab as ql"
SLOW = "training.model.register_forward_hook(lambda *_: print('in a step') or time.sleep(0.3))"


class Kernel:
    """A real one, driven as a notebook does."""

    def __init__(self, folder):
        quiet = ["--log-level=ERROR"]
        self.manager, self.client = start_new_kernel(kernel_name="python3", cwd=str(folder), extra_arguments=quiet)
        self.buttons = {}  # description -> id of its comm

    def start(self, source):
        return self.client.execute(source)

    def texts(self, cell, until=None):
        """The texts that a cell puts out until it ends, or until one matches `until`."""
        texts = []
        while True:
            message = self.client.get_iopub_msg(timeout=60)
            kind, content = message["msg_type"], message["content"]
            if kind == "comm_open":
                self.buttons[content["data"]["state"].get("description")] = content["comm_id"]
            if message["parent_header"].get("msg_id") != cell:
                continue
            if kind == "status" and content["execution_state"] == "idle":
                return texts
            if kind in ("stream", "display_data", "error"):
                texts.append(content.get("text") or content.get("evalue") or content["data"].get("text/plain", ""))
                if until and re.search(until, texts[-1]):
                    return texts

    def press(self, button):
        update = {"method": "update", "state": {"clicks": 1}, "buffer_paths": []}
        content = {"comm_id": self.buttons[button], "data": update}
        self.client.shell_channel.send(self.client.session.msg("comm_msg", content))

    def stop(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(tmp_path):
    kernel = Kernel(tmp_path)
    yield kernel
    kernel.stop()


@pytest.mark.slow
def test_the_interrupt_button_of_a_real_kernel(kernel):
    """It raises no CancelledError, as it does in other cells that await; the kernel lives, and goes on by resume."""
    kernel.texts(kernel.start(SETUP))
    cell = kernel.start(f"training = toy_training('run', 100)\n{SLOW}\nawait ql.live(training)")
    kernel.texts(cell, until="in a step")
    kernel.manager.interrupt_kernel()
    texts = kernel.texts(cell)
    steps = int(re.search(r"over (\d+) of 100 steps: .* Ended: asked to stop", texts[-2])[1])
    assert texts[-1] == f"stopped after step {steps} of 100, all of it saved in run: continue with resume=True"
    for _ in range(3):  # the handler of the run must not be there any more
        kernel.manager.interrupt_kernel()
    (text,) = kernel.texts(kernel.start("print(len(training.lines), training.result.ended)"))
    assert text == f"{steps} asked to stop\n"


@pytest.mark.slow
def test_a_real_kernel_serves_a_press_in_the_pause_after_the_step(kernel):
    kernel.texts(kernel.start(SETUP))
    cell = kernel.start(f"training = toy_training('run', 100)\n{SLOW}\nrun = await ql.live(training)")
    kernel.texts(cell, until="in a step")
    kernel.press("Stop after this step")
    texts = kernel.texts(cell)
    assert re.search(r"over [123] of 100 steps: .* Ended: asked to stop", texts[-1])  # with one turn of the loop: 5


@pytest.mark.slow
def test_what_a_notebook_stores_passes_nbval(tmp_path):
    cells = ["from toy_training import *\nimport qlora_lab as ql", "run = await ql.live(toy_training('run', 20))"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    shutil.copy(Path(__file__).parent / "toy_training.py", tmp_path)
    stored = normalise(execute(notebook, tmp_path))
    texts = [output.data["text/plain"] for output in stored.cells[1].outputs]
    assert texts[-2] == "training: 20 steps of 4 examples" and "over 20 of 20 steps: mean of" in texts[-1]
    assert "<img alt=" in stored.cells[1].outputs[-1].data["text/html"]
    (tmp_path / "live.ipynb").write_text(text_of(stored))
    shutil.rmtree(tmp_path / "run")
    options = ["--nbval", "--nbval-current-env", "--nbval-cell-timeout=120", "-p", "no:cacheprovider"]
    rules = Path(__file__).parents[2] / "nbval_sanitize.cfg"
    command = [sys.executable, "-m", "pytest", *options, f"--nbval-sanitize-with={rules}", f"--rootdir={tmp_path}"]
    done = subprocess.run([*command, "live.ipynb"], cwd=tmp_path, capture_output=True, text=True)
    assert "2 passed" in done.stdout, done.stdout[-3000:]
