"""One page of a tournament's results, with all answers side by side: HTML that needs no other file and no network.

In: standings, questions, answers and the rows of the games. Out: the page, a text.
What models answered is foreign text: it is escaped letter by letter, and the page's own policy forbids every script,
so that an answer that holds one stays words.
Not here: the ratings (measure/standings.py), writing the file (cli/tournament.py).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from qlora_lab.measure.judges import Question
from qlora_lab.show.escape import for_html, spelled

START = "<!doctype html>\n<!-- qlora-lab tournament -->\n"  # the command replaces no page without it
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
table { border-collapse: collapse; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #8886; }
th:first-child, td:first-child { text-align: left; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #8882; padding: .5rem; margin: .3rem 0; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .5rem 1rem; }
h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
"""


def tournament_page(
    table: Sequence[Mapping[str, str]],
    sentences: Iterable[str],
    questions: Iterable[Question],
    answers: Mapping[str, Mapping[str, str]],
    rows: Iterable[Mapping],
) -> str:
    """Return the page. table: rows of column -> cell, as printed. sentences: what to know before believing it."""
    wins = Counter((row["question"], row[row["verdict"]]) for row in rows if row["verdict"] in ("first", "second"))
    games = 2 * (len(answers) - 1)  # of a system on a question
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    parts = [
        f'{START}<html lang="en"><head>{head}<title>Tournament</title><style>{STYLE}</style></head><body>',
        f"<h1>Tournament of {len(answers)} systems</h1>",
        _table(table),
        *(f"<p>{_shown(sentence)}</p>" for sentence in sentences),
        "<h2>Questions and answers</h2>",
    ]
    for number, question in enumerate(questions, 1):
        parts += [f"<details{' open' * (number == 1)}><summary>Question {number} ({_shown(question.id)})</summary>"]
        parts += [_text(question.prompt), "<h3>Written by a person</h3>", _text(question.reference or "no reference")]
        parts += ['<div class="answers">']
        for system, texts in answers.items():
            won = f"won {wins[question.id, system]} of {games}"
            parts += [f"<section><h3>{_shown(system)}: {won}</h3>{_text(texts[question.id])}</section>"]
        parts += ["</div></details>"]
    return "\n".join([*parts, "</body></html>\n"])


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    head = "".join(f"<th>{_shown(name)}</th>" for name in rows[0])
    body = ("".join(f"<td>{_shown(cell)}</td>" for cell in row.values()) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{cells}</tr>' for cells in body)}</table>"


def _text(text: str) -> str:
    # dir="auto" also isolates: a right-to-left mark in one answer turns no other text
    return f'<pre dir="auto">{_shown(text)}</pre>'


def _shown(text: str) -> str:
    return for_html(spelled(text))
