"""Talk with a model in a notebook: a question, and the answers of the base and of the adapter side by side.

In: a model and its tokenizer. Out: a panel with a text field, buttons, and a column for each of the two.

    ql.ChatPanel(model, tokenizer)

Answers are written between the cells, token by token in the kernel's own loop: a cell that runs makes them pause, and
never computes beside them. (A thread would: numba's kernels may not run in two at once.) So the Stop button acts after
at most one token, but not while a cell runs.

Not here: conversations without a page (infer/chat.py).
"""

import asyncio
import html
import time
from collections.abc import Iterator
from contextlib import closing

import ipywidgets as W
import torch
import traitlets as T

from qlora_lab.adapters.adapter import has_adapters
from qlora_lab.infer.chat import Chat
from qlora_lab.infer.decode import GREEDY
from qlora_lab.infer.sampling import Sampling
from qlora_lab.show.control import Control, Shown
from qlora_lab.show.escape import for_html, spelled
from qlora_lab.show.slider import FOCUS, Button
from qlora_lab.show.still import StatusLine, show_over

LONGEST = 20_000  # characters of a question: a page can send any
REDRAW_EVERY = 0.1  # seconds: a message for each token would be more than a page draws
TURNS = 10  # of the kernel's loop after a token: a press of a button needs five (measured for live.py)


class QuestionField(Control):
    """A text field with a Send button. `sent` is [number, text]: the same question twice is news, too."""

    moved = "sent"
    sent = T.List([0, ""]).tag(sync=True)
    busy = T.Bool(False).tag(sync=True)  # an answer is being written

    _esm = """
    export default { render({ model, el }) {
      const form = document.createElement("form"), label = document.createElement("label");
      const input = document.createElement("input"), button = document.createElement("button");
      el.classList.add("qlora-question", "qlora-control");
      input.type = "text"; input.autocomplete = "off"; input.id = "qlora-" + Math.random().toString(36).slice(2);
      input.dataset.lmSuppressShortcuts = button.dataset.lmSuppressShortcuts = "true";
      label.htmlFor = input.id; label.textContent = model.get("description");
      button.type = "submit"; button.textContent = "Send";
      form.append(label, input, button); el.append(form);
      form.addEventListener("submit", event => {
        event.preventDefault();                                        // a form would load the page anew
        if (!input.value.trim() || model.get("busy")) return;
        model.set("sent", [model.get("sent")[0] + 1, input.value]); model.save_changes();
        input.value = "";
      });
      input.addEventListener("keydown", event => {                     // Lab takes the browser's own Enter away
        if (event.key !== "Enter" || event.isComposing) return;        // an input method's Enter chooses a word
        event.preventDefault(); event.stopPropagation(); form.requestSubmit();
      });
      const show = () => { button.disabled = model.get("busy"); };
      model.on("change:busy", show); show();
    } };
    """
    _css = f"""
    .qlora-question form {{ display: grid; grid-template-columns: 1fr auto; gap: 4px 8px; margin: 2px;
                            font-size: var(--jp-ui-font-size1, 13px); color: var(--jp-ui-font-color1, inherit); }}
    .qlora-question label {{ grid-column: 1 / -1; font-weight: 600; }}
    .qlora-question :is(input, button) {{ padding: 4px 8px; font: inherit; color: inherit; border-radius: 3px;
                            background: var(--jp-layout-color2, #eee);
                            border: 1px solid var(--jp-border-color1, #999); }}
    .qlora-question :focus-visible {{ {FOCUS} }}
    """

    def takes(self, value):
        if not (type(value) is list and len(value) == 2 and type(value[0]) is int and type(value[1]) is str):
            return False
        number, text = value
        return not self.busy and self.sent[0] < number < 2**53 and 0 < len(text.strip()) <= len(text) <= LONGEST

    def rule(self):
        return f"a larger number and a question of 1 to {LONGEST:,} characters, once the last answer has ended"


class Column(Shown):
    """The conversation with one model, as HTML that Python has escaped."""

    title = T.Unicode().tag(sync=True)
    turns = T.Unicode().tag(sync=True)
    speed = T.Unicode().tag(sync=True)
    busy = T.Bool(False).tag(sync=True)

    _esm = """
    export default { render({ model, el }) {
      const title = document.createElement("strong"), log = document.createElement("div");
      const speed = document.createElement("div");
      el.classList.add("qlora-column");
      log.setAttribute("role", "log"); log.setAttribute("aria-label", model.get("title"));
      log.tabIndex = 0;                                                // so that keys can scroll it
      log.dataset.lmSuppressShortcuts = "true";
      title.textContent = model.get("title");
      el.append(title, log, speed);
      const show = () => {
        const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 20;
        log.ariaBusy = String(model.get("busy"));                      // read aloud once it is whole
        log.innerHTML = model.get("turns");
        speed.textContent = model.get("speed");
        if (atEnd) log.scrollTop = log.scrollHeight;                   // but a reader who has scrolled up stays there
      };
      model.on("change", show); show();
    } };
    """
    _css = f"""
    .qlora-column {{ flex: 1 1 300px; min-width: 0; font-size: var(--jp-ui-font-size1, 13px);
                     color: var(--jp-ui-font-color1, inherit); }}
    .qlora-column [role=log] {{ min-height: 6em; max-height: 26em; overflow-y: auto; padding: 4px 8px;
                     border: 1px solid var(--jp-border-color1, #999); border-radius: 3px; }}
    .qlora-column [role=log]:focus-visible {{ {FOCUS} }}
    .qlora-column p {{ margin: 4px 0; white-space: pre-wrap; overflow-wrap: anywhere; }}
    .qlora-column .qlora-user {{ font-weight: 600; }}
    """

    def show(self, turns, speed="", busy=False):
        """Change all in one message. turns: (role, text) of foreign texts."""
        with self.hold_sync():
            # all turns: a page that is opened late, or twice, then needs no history of messages
            self.turns = turns_html(turns)
            self.speed = speed
            self.busy = busy


def turns_html(turns: list[tuple[str, str]]) -> str:
    """Write turns as paragraphs: markup and formulas in them are shown letter by letter.

    The whole text is escaped anew with each piece, so half a tag at the end of one is escaped as well. `dir` keeps a
    right-to-left mark within its own turn.
    """
    return "".join(f'<p class="qlora-{html.escape(role)}" dir="auto">{for_html(spelled(t))}</p>' for role, t in turns)


class ChatPanel:
    """A conversation in a notebook: base and adapter side by side; a model without an adapter has one column.

    panel.ask("...") asks from Python, and waits for the answers. panel.chats: the conversations, by column.
    Raises ValueError for a max_new_tokens that is not allowed, for a model all of whose weights learned, and for
    int8 (`sampling`) where `decode` would refuse them.
    """

    def __init__(
        self, model: torch.nn.Module, tokenizer, max_new_tokens: int = 256, sampling: Sampling = GREEDY
    ) -> None:
        # the base on the left, where reading begins: a reader asks what the adapter changed
        names = {"Base": False, "With the adapter": True} if has_adapters(model) else {"Model": True}
        made = {n: Chat(model, tokenizer, max_new_tokens, sampling, adapter=adapter) for n, adapter in names.items()}
        self.chats: dict[str, Chat] = made
        self.columns = [Column(title=name) for name in made]
        self.question = QuestionField(description="Question")
        self.stop, self.reset = Button("Stop"), Button("Reset")
        self._stopped = False
        self._task: asyncio.Task | None = None  # kept, because the loop alone would let it be collected
        try:
            self._loop = asyncio.get_running_loop()  # a kernel's main one, whichever thread a message comes through
        except RuntimeError:  # a plain process: nobody presses a button
            self._loop = None
        self.question.observe(self._sent, "sent")
        self.stop.observe(self._stop, "clicks")
        self.reset.observe(self._reset, "clicks")
        self._status = StatusLine(self.question, self.stop, self.reset)
        wrap = W.Layout(flex_flow="row wrap", grid_gap="8px 16px")
        buttons = W.Box([self.stop, self.reset], layout=wrap)
        self.widget = W.VBox([self._status, W.Box(self.columns, layout=wrap), self.question, buttons])
        self.widget.add_class("qlora-live")  # still.py looks for it

    def ask(self, question: str) -> list[str]:
        """Ask from Python, and return the answers, one for each column, once they are whole.

        Raises ValueError while another question is being answered.
        """
        if self.question.busy:
            raise ValueError("another question is being answered: wait for its end, or press Stop")
        for _ in self._steps(question):
            pass
        return [chat.reply.text if chat.reply else "" for chat in self.chats.values()]

    def _sent(self, change) -> None:
        self.question.busy = True  # at once: a second question in the same turn of the loop is refused
        if self._loop is None:
            for _ in self._steps(change["new"][1]):
                pass
        else:
            # a message may come through a subshell's thread, where it would compute beside the cells
            self._loop.call_soon_threadsafe(self._begin, change["new"][1])

    def _begin(self, question: str) -> None:
        self._task = self._loop.create_task(self._answer(question))

    async def _answer(self, question: str) -> None:
        with closing(self._steps(question)) as steps:
            for _ in steps:
                for _ in range(TURNS):  # the kernel serves messages meanwhile: Stop, and cells
                    await asyncio.sleep(0)

    def _stop(self, _change) -> None:
        self._stopped = True

    def _reset(self, _change) -> None:
        self._stopped = True  # an answer that is being written must not come back
        if not self.question.busy:
            self._forget()

    def _forget(self) -> None:
        for chat, column in zip(self.chats.values(), self.columns, strict=True):
            chat.reset()
            column.show([])

    def _steps(self, question: str) -> Iterator[None]:
        """Write all columns by turns, a piece each; yields after each piece."""
        self._stopped, self.question.busy, self._status.text = False, True, ""
        resets = self.reset.clicks
        writing: list[_Writing] = []
        try:
            for chat, column in zip(self.chats.values(), self.columns, strict=True):
                writing.append(_Writing(chat, column, question))
            going = list(writing)
            while going and not self._stopped:
                one = going.pop(0)
                if one.step():
                    going.append(one)  # behind the others: by turns
                yield
        except (ValueError, FloatingPointError) as error:  # such as a full context
            self._status.text = str(error)
        except Exception as error:  # such as no memory; a task keeps its error to itself
            self._status.text = f"{type(error).__name__}: {error}"
            raise
        finally:  # a task that is cancelled comes here as well
            for one in writing:
                one.close()
            self.question.busy = False
            if self.reset.clicks > resets:  # pressed while it was written
                self._forget()

    def __repr__(self) -> str:
        return f"Chat: {', '.join(self.chats)}"

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, object]:
        """Give what a stored notebook keeps: the turns so far, without speeds, which differ each time."""
        columns = (f"<div>{html.escape(c.title)}</div>{c.turns}" for c in self.columns)
        return {"text/html": f"{''.join(columns)}<div>Run this cell to chat.</div>", "text/plain": repr(self)}

    def _ipython_display_(self) -> None:
        """Show the live panel in a notebook."""
        show_over(self._repr_mimebundle_(), self.widget)


class _Writing:
    """One answer on its way into a column."""

    def __init__(self, chat: Chat, column: Column, question: str):
        self._chat, self._column = chat, column
        self._before = [*chat.turns, ("user", question)]
        self._text = ""
        self._due = 0.0  # the time of the next message to the page
        self._pieces = chat.ask(question)
        # the first answer may wait for a kernel that is compiled once, so an empty column would look broken
        self._column.show(self._before, "reading the question", busy=True)

    def step(self) -> bool:
        """Write one piece more. Returns whether there was one."""
        piece = next(self._pieces, None)
        if piece is None:
            self.close()  # now, although the other column may write on: its speed is known
            return False
        self._text += piece
        if time.perf_counter() >= self._due:
            self._column.show([*self._before, ("assistant", self._text)], "writing", busy=True)
            self._due = time.perf_counter() + REDRAW_EVERY
        return True

    def close(self) -> None:
        """End the answer where it is, and show its speed."""
        self._pieces.close()
        reply = self._chat.reply
        if reply is None:  # stopped before it began: the question is forgotten, as in the conversation
            self._column.show(self._chat.turns)
            return
        ended = {"end": "", "context": "the context is full: press Reset"}.get(reply.ended, f"ended: {reply.ended}")
        self._column.show([*self._before, ("assistant", reply.text)], "; ".join(filter(None, [reply.speed, ended])))
