"""docs/templates.md: what is learned under chat templates of today.

In: the cases of tests/finetune/chat_templates.py. Out: the page, made by encoding their conversations; main writes it.

Not here: what is right, which test_templates.py compares with what was found by hand.
"""

from pathlib import Path

from qlora_lab.finetune.data import IGNORED, encode
from qlora_lab.finetune.encode import Encoded
from tests.finetune.chat_templates import CASES, CONVERSATIONS, Case, tokenizer_of

PAGE = Path(__file__).parent.parent / "docs" / "templates.md"
COMMAND = "python -m tools.templates_page"
HEAD = f"""# What is learned under a chat template

A chat template writes a conversation as one text, and each model family has its own. This page shows which parts of
that text QLoRA Lab learns: what the model has to write itself, up to the token that ends its answer.

`{COMMAND}` writes this page; a test fails when it is out of date.

The conversations: "one turn" asks `2 + 2?` and is answered `4`; "several" goes on with `And 3?` and `7`; in "thoughts"
both answers begin with a thought in `<think>` and `</think>`. A line break is written ⏎. The templates are reduced to
what they do to turns.

| template | one turn | several | thoughts |
|---|---|---|---|
"""
TAIL = """
- **An earlier answer is hidden** where a template cuts its thought: the model is never asked to write such a turn as
  the template shows it, so it is not learned, and counted (`EncodeReport.notes.hidden`, a warning, the doctor).
- **The last answer is shown in part** where a template cuts its thought too: what is shown is learned, and counted.
- A template with `{% generation %}` says itself what is generated, and is believed: SmolLM3's names its headers, too.
- Text that a template writes after the end token, such as Phi-3's `<|endoftext|>` after the whole chat, is not learned.
- Control tokens that a text spells are encoded as text under every template.
"""


def page() -> str:
    """The page as Markdown."""
    return HEAD + "".join(f"{_row(case)}\n" for case in CASES.values()) + TAIL


def _row(case: Case) -> str:
    tokenizer = tokenizer_of(case)
    cells = [_cell(encode(example, tokenizer), tokenizer) for example in CONVERSATIONS.values()]
    return f"| {' | '.join([case.title, *cells])} |"


def _cell(encoded: Encoded, tokenizer) -> str:
    notes = ["an earlier answer is hidden"] * encoded.notes.hidden + [
        "the last is shown in part"
    ] * encoded.notes.shortened
    texts = " … ".join(f"`{_shown(tokenizer.decode(run))}`" for run in _runs(encoded.labels))
    return f"{texts} ({', '.join(notes)})" if notes else texts


def _runs(labels: list[int]) -> list[list[int]]:
    runs = [[]]
    for label in labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [run for run in runs if run]


def _shown(text: str) -> str:
    return text.replace("\n", "⏎").replace("|", "\\|")


def main() -> None:
    """Write the page."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
