"""Write a conversation as one text with a chat template, and find where each turn stands in that text.

Source: `{% generation %}` blocks and `apply_chat_template` of transformers.

Templates do more than join turns: they drop the thoughts of earlier answers (Qwen3), move the system's text into a
question (Llama 2), trim, open a thought in the prompt (R1), or write an end after the whole chat (Phi-3). So nothing is
assumed about headers. Instead the conversation is rendered once more with a mark at the end of each content, and the
marks show where contents end. If the two texts differ in more than the marks, the template is refused.

Not here: tokens, and the end token of an answer (labels.py).
"""

import json
import re
from collections.abc import Container
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from itertools import accumulate, count
from os.path import commonprefix
from typing import TYPE_CHECKING, NamedTuple

from qlora_lab.data.examples import Turns, check_text
from qlora_lab.data.tool_calls import THOUGHT, Parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

# For a tokenizer without a chat template, such as base Llama 2's.
PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{% if message.role == 'user' %}{{ '### Instruction:\\n' }}"
    "{% elif message.role == 'assistant' %}{{ '### Response:\\n' }}{% endif %}"
    "{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
)
DEVELOPER = re.compile(r"""["']developer["']""")  # a template that knows this role compares a role with it
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PART = re.compile(r"""\btype\b""")  # a template that reads parts asks for their type
PROBE = "quizzaciously"  # to see whether a template shows it: a number could be that of a date which it writes
DIRECTIVE = re.compile(r"%[-#]?[A-Za-z]")  # strftime's: %d, %-d
# Replaces transformers' clock by the run's. A macro, since transformers passes no functions to a template. It ends in
# an empty expression, because Jinja drops a line break after a block.
CLOCK = (
    "{% macro strftime_now(format) %}{% set written = namespace(text=format) %}"
    "{% for directive, value in run_clock.items() %}"
    "{% set written.text = written.text | replace(directive, value) %}{% endfor %}"
    "{{ written.text }}{% endmacro %}{{ '' }}"
)
LONGEST = 300  # characters of a template's own error that ours quotes
MARKS = range(0x10FF00, 0x10FFFE)  # private-use characters: hardly any text holds one
Span = tuple[int, int]  # first and one-past-last character


class Place(NamedTuple):
    """Character `offset` of the content of `turn` stands at `place` in the text.

    An offset of -1 is the end of the first text of Parts.texts, -2 of the second; a tool's turn is -1.
    """

    turn: int
    offset: int
    place: int


@dataclass(frozen=True)
class Answer:
    """Where an answer stands in the text."""

    start: int  # where its prompt ends
    stop: int  # where its content ends
    whole: bool  # all of its content is shown
    generated: Span | None = None  # its `{% generation %}` block, if the template marks them

    @property
    def openings(self) -> tuple[int, ...]:
        """Places where the prompt for the answer ends, and that for its block."""
        return (self.start,) if self.generated is None else (self.generated[0], self.start)


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, or PLAIN_TEMPLATE. Raises ValueError for a slow tokenizer, without offsets."""

    tokenizer: "Tokenizer"
    clock: datetime | None = None  # the time that the template writes; None: that of each call
    parts: Parts = Parts()  # of the conversation: what it gets beside roles and texts
    marks: frozenset[str] = frozenset()  # control tokens that stand for a picture, which messages may hold as tokens

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            name = type(self.tokenizer).__name__
            raise ValueError(f"{name} does not say where its tokens stand in a text: use a fast one (tokenizer.json)")
        # In a text, it would be encoded as text; in these, no place tells which of a template's words they are.
        spelt = self.control_texts.search(json.dumps([*self.parts.turns.values(), self.parts.tools], default=repr))
        if spelt:
            raise ValueError(f"a tool, a tool call or a thought spells the control token {spelt[0]!r}: leave it out")

    def of(self, parts: Parts, marks: frozenset[str] = frozenset()) -> "ChatTemplate":
        """Return the template for a conversation with these parts, and with pictures that take these marks."""
        same = parts == self.parts and marks == self.marks
        return self if same else replace(self, parts=parts, marks=marks)

    @cached_property
    def control(self) -> dict[str, int]:
        """Text -> id of the tokens that steer a model; no message may contain one as a token."""
        added = self.tokenizer.added_tokens_decoder
        return {t.content: number for number, t in added.items() if t.special and t.content not in self.marks}

    @cached_property
    def control_names(self) -> dict[int, str]:
        return {number: text for text, number in self.control.items()}

    @cached_property
    def control_texts(self) -> re.Pattern:
        longest_first = sorted(self.control, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) matches nowhere

    @cached_property
    def source(self) -> str:
        """The template's text. Raises ValueError if nothing could end an answer."""
        if self.tokenizer.chat_template:
            return self.tokenizer.get_chat_template()
        if self.tokenizer.eos_token is None:
            raise ValueError("the tokenizer has neither a chat template nor an eos token: set tokenizer.eos_token")
        return PLAIN_TEMPLATE

    @cached_property
    def is_dated(self) -> bool:
        return "strftime_now" in self.source

    @cached_property
    def _developer(self) -> str:
        """The role under which a developer's text is written: most templates have only its older name, system."""
        return "developer" if DEVELOPER.search(self.source) else "system"

    @cached_property
    def _thought(self) -> str:
        """The name under which the template reads a thought: gpt-oss has one of its own."""
        return THOUGHT if THOUGHT in self.source or "thinking" not in self.source else "thinking"

    def _messages(self, turns: Turns, parts: Parts) -> list[dict]:
        names = {THOUGHT: self._thought}
        roles = {"developer": self._developer}
        messages = []
        for i, (role, content) in enumerate(turns):
            fields = {names.get(name, name): value for name, value in parts.turns.get(i, {}).items()}
            shown = [{"type": "text", "text": content}] if self._takes_parts else content
            messages.append({"role": roles.get(role, role), "content": shown} | fields)
        return messages

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template shows a text only as a list of parts, as LLaVA's does: found out by trying."""
        return bool(PART.search(self.source)) and _is_shown(self, [{"type": "text", "text": PROBE}])

    @cached_property
    def _options(self) -> dict:
        if self.clock is None or not self.is_dated:
            return {"chat_template": self.source}
        written = {directive: self.clock.strftime(directive) for directive in DIRECTIVE.findall(self.source)}
        return {"chat_template": CLOCK + self.source, "run_clock": written}

    def is_spelt_in(self, turns: Turns) -> bool:
        """Tell whether a text of `turns` spells a control token."""
        return any(self.control_texts.search(content) for _, content in turns)

    def render(self, turns: Turns, opens_answer: bool = False) -> str:
        """Write the conversation as text; opens_answer: followed by the opening of the next answer.

        Raises ValueError for a text that cannot be encoded, and for a conversation that the template refuses.
        """
        for role, content in turns:
            check_text(content, f"the content of the {role} turn")
        return self._render(turns, add_generation_prompt=opens_answer)

    def places(self, turns: Turns, text: str, opens_answer: bool = False) -> list[Place]:
        """Find where contents end in `text`, the render of `turns`, and where they spell control tokens.

        Places come in the order of the text; what the template does not show is left out. Raises ValueError if marks
        change the render, so that they find nothing.
        """
        used = text + "".join(content for _, content in turns) + str(self.parts)  # a mark must occur in none of it
        mark = next(chr(code) for code in MARKS if chr(code) not in used)
        for also_empty in (True, False):  # a template may ask whether there is content
            marked = tuple(
                (role, self._marked(content, f"{mark}{i}{mark}", mark, also_empty))
                for i, (role, content) in enumerate(turns)
            )
            rendered = self._render(marked, self._marked_parts(mark), add_generation_prompt=opens_answer)
            pieces = re.split(f"{mark}(-?[0-9]+){mark}(-?[0-9]+){mark}", rendered)
            if "".join(pieces[::3]) == text:
                places = accumulate(len(piece) for piece in pieces[::3])
                marks = zip(pieces[1::3], pieces[2::3], places, strict=False)  # the text after the last mark is left
                return [Place(int(turn), int(offset), place) for turn, offset, place in marks]
        raise ValueError(
            "the chat template writes a message differently when a mark follows it, so its turns cannot be located: "
            "use another template"
        )

    def _marked(self, text: str, turn: str, mark: str, also_empty: bool) -> str:
        content = text.rstrip()
        if not content and not also_empty:
            return text
        spelt = self.control_texts.sub(lambda match: f"{turn}{match.start()}{mark}{match[0]}", content)
        return f"{spelt}{turn}{len(content)}{mark}{text[len(content) :]}"

    def _marked_parts(self, mark: str) -> Parts:
        numbers = count(1)

        def marked(turn: int, name: str, text: str) -> str:
            shown = text.rstrip()
            return f"{shown}{mark}{turn}{mark}-{next(numbers)}{mark}{text[len(shown) :]}"

        return self.parts.marked(marked)

    def hidden_thoughts(self, turns: Turns, places: list[Place]) -> set[int]:
        """Return the earlier answers whose thoughts the template leaves out, as some do, to save room.

        Raises ValueError, by name, for anything else of the parts that it leaves out.
        """
        shown = {-place.offset for place in places}
        missing = [part for number, part in enumerate(self.parts.texts(), 1) if number not in shown]
        hidden = set()
        for turn, name, text in missing:
            if name != THOUGHT or turn == len(turns) - 1 or self._thought not in self.source:
                advice = "write it in the text as <think>...</think>, or use" if name == THOUGHT else "use"
                raise ValueError(
                    f"the chat template does not show {text[:60]!r} of {name!r}: {advice} another template"
                )
            hidden.add(turn)
        closed = ends(turns, places)
        for turn in self.parts.calling:
            if turns[turn][1].strip() and turn not in closed:
                text = f"{turns[turn][1][:60]!r}, the text beside a tool call"
                raise ValueError(f"the chat template does not show {text}: leave it out, or use another template")
        return hidden

    def answers(self, turns: Turns, text: str, closed: dict[int, int]) -> dict[int, Answer]:
        """Return turn -> Answer for each answer that `text` shows in part or whole. closed: turn -> end of its content.

        An answer starts where a prompt for it ends. What a prompt writes between a question and its answer is read
        once, from the prompt for the last answer: rendering a prompt for each turn would take quadratic time.
        """
        openings = {}  # role of the turn before an answer -> what a prompt writes between them
        for i, (role, _) in enumerate(turns[:-1]):
            if turns[i + 1][0] == "assistant":
                openings[role] = i + 1
        openings = {role: self._opening(turns[:i]) for role, i in openings.items()}
        blocks = self._generated(turns) if GENERATION.search(self.source) else None
        shown_answers = {}
        for i, (role, content) in enumerate(turns):
            if role != "assistant":
                continue
            before = closed.get(i - 1)
            said = None if i in self.parts.calling else content.rstrip()  # calls follow the text, in unknown form
            start, stop = _span(said, text, before, closed.get(i), openings.get(turns[i - 1][0]))
            if start is None:
                continue
            shown = text[start if before is None else min(before, start) : stop]  # R1's prompts open the thought
            block = next((block for block in blocks or () if block[0] <= stop <= block[1]), None)
            if blocks is None or block:
                shown_answers[i] = Answer(start, stop, _squeezed(content) in _squeezed(shown), block)
        return shown_answers

    def _opening(self, prompt: Turns) -> str | None:
        """Return what a prompt writes after the content of its last turn; None if that cannot be found."""
        try:
            text = self.render(prompt, opens_answer=True)
            end = ends(prompt, self.places(prompt, text, opens_answer=True)).get(len(prompt) - 1)
        except ValueError:
            return None
        return None if end is None else text[end:]

    def _generated(self, turns: Turns) -> list[Span]:
        from transformers.utils.chat_template_utils import render_jinja_template

        options = {**self.tokenizer.special_tokens_map, **self._options, "tools": self.parts.tools or None}
        _, (blocks,) = render_jinja_template(
            [self._messages(turns, self.parts)], return_assistant_tokens_mask=True, **options
        )
        return blocks

    def _render(self, turns: Turns, parts: Parts | None = None, **options) -> str:
        parts = parts or self.parts
        options |= self._options | {"tools": parts.tools or None}
        try:
            text = self.tokenizer.apply_chat_template(self._messages(turns, parts), tokenize=False, **options)
            check_text(text, "what it writes")
            return text
        except Exception as error:  # a template is somebody's program: it may raise anything
            opening = f"{turns[0][0]}: {turns[0][1][:60]!r}"
            said = " ".join(str(error).split())[:LONGEST]
            raise ValueError(f"the chat template refuses the conversation that begins {opening}: {said}") from error


def _is_shown(template: ChatTemplate, content: list | str) -> bool:
    """Tell whether a template shows a question in this form, and not as a text. Templates that fail show nothing."""

    def shown(content: list | str) -> bool:
        messages = [{"role": "user", "content": content}]
        try:
            return PROBE in template.tokenizer.apply_chat_template(messages, tokenize=False, **template._options)
        except Exception:  # a template is somebody's program
            return False

    return not shown(PROBE) and shown(content)


def ends(turns: Turns, places: list[Place], calling: Container[int] = ()) -> dict[int, int]:
    """Return turn -> where its content ends, not counting white space around it, which some templates drop.

    Turns that are `calling` end with the last text of their tool calls.
    """
    inside = [place for place in places if place.turn >= 0]
    return {i: place for i, offset, place in inside if offset == len(turns[i][1].rstrip()) or i in calling}


def _span(
    content: str | None, text: str, before: int | None, end: int | None, opening: str | None
) -> tuple[int | None, int]:
    """Return start and end of an answer. before: where the content of the turn before it ends in `text`.

    content: None for one that only its opening can tell from what is before.
    """
    prompt = before is not None and opening is not None and (end is None or before <= end)
    if end is None:  # not marked, as it is empty; or not shown
        end = before + len(opening) if prompt and not content and text.startswith(opening, before) else None
        return end, end or 0
    if prompt and text.startswith(opening, before) and before + len(opening) <= end:
        return before + len(opening), end
    # Earlier turns are not always written as a prompt is: R1 opens a thought in prompts only.
    header = before + len(commonprefix([opening, text[before:end]])) if prompt else None
    if content is None:
        return header, end
    shown = next((c for c in (content, content.lstrip()) if text.endswith(c, 0, end)), None)
    if shown is None:
        return header, end
    # White space before the answer may be its header's, where the template trims: take as much as fits, but no text.
    return max(min(header or 0, end - len(content.lstrip())), end - len(shown)), end


def _squeezed(text: str) -> str:
    return "".join(text.split())  # templates change white space
