"""Write docs/templates.md: which parts of a conversation are learned under today's chat templates.

In: the cases of tests/data/chat_templates.py. Out: the page, made by encoding their conversations.

Not here: a check of the page. test_templates.py compares what is learned with labels that were made by hand.
"""

from pathlib import Path

from qlora_lab.data.labels import IGNORED, Encoded, encode
from qlora_lab.show.escape import code_span
from tests.data.chat_templates import CASES, CONVERSATIONS, Case, tokenizer_of

PAGE = Path(__file__).parent.parent / "docs" / "templates.md"
COMMAND = "python -m tools.templates_page"
HEAD = f"""# What is learned under a chat template

A chat template writes a conversation as one text, and each model family has its own. From that text the model learns
what it has to write itself: the answers, each up to and including the token that ends it. This page shows which text
that is.

`{COMMAND}` writes this page; a test fails when it is out of date.

There are three conversations. In "one turn" the user asks `2 + 2?` and the answer is `4`. "Several turns" goes on with
`And 3?` and `7`. In "thoughts", each of these two answers begins with a thought between `<think>` and `</think>`. The
sign ⏎ is a line break, and … stands for text that is shown to the model but not learned. Each template is reduced to
what it does to turns.

| template | one turn | several turns | thoughts |
|---|---|---|---|
"""
TAIL = """
- **An earlier answer is hidden**: the template leaves out the thought of an answer that is not the last. The model
  would never write the turn as the template shows it, so the turn is not learned. Hidden answers are counted in
  `EncodeReport.notes.hidden`, and a warning and the doctor report them.
- **The last answer is shown in part**: the template leaves out its thought too. The part that is shown is learned, and
  such answers are counted in `EncodeReport.notes.shortened`.
- `--last-answer-only` (`ql.finetune(..., last_answer_only=True)`) learns the last answer of each conversation and shows
  the others, under every template. It suits templates that rewrite earlier answers, and it is the only way for one that
  ends no answer but the last. To learn every answer as the model has to write it, give a record for each.
- Tool calls are learned like answers, up to the token that ends the turn. `reasoning_content` is learned where the
  template shows it. Tools and results are shown only.
- A template that marks what is generated, with `{% generation %}`, is taken at its word. SmolLM3's marks the headers of
  its answers too.
- Text that a template writes after the end token, such as Phi-3's `<|endoftext|>` after the whole chat, is not learned.
- A control token that is spelled out in a message is encoded as ordinary text, under every template.
"""


def page() -> str:
    """The page as Markdown."""
    return HEAD + "".join(f"{_row(case)}\n" for case in CASES.values()) + TAIL


def _row(case: Case) -> str:
    tokenizer = tokenizer_of(case)
    cells = [_cell(encode(example, tokenizer), tokenizer) for example in CONVERSATIONS.values()]
    return f"| {' | '.join([case.title, *cells])} |"


def _cell(encoded: Encoded, tokenizer) -> str:
    notes = ["an earlier answer is hidden"] * encoded.notes.hidden
    notes += ["the last answer is shown in part"] * encoded.notes.shortened
    texts = " … ".join(code_span(_shown(tokenizer.decode(run))) for run in _runs(encoded.labels))
    return f"{texts} ({', '.join(notes)})" if notes else texts


def _runs(labels: list[int]) -> list[list[int]]:
    """The unbroken runs of tokens that are learned."""
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
