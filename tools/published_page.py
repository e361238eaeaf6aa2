"""Write docs/published.md: which published figures come out if they are computed again, and why the others do not.

    python -m tools.published_page

In: the tables of data/published and their replays. Out: the page. A test compares it with what the replays say.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from qlora_lab.files.replace import replace_text
from qlora_lab.measure.published import (
    Chatbot,
    Glue,
    LlavaFinding,
    Perplexity,
    RelativeQuestions,
    published,
    published_games,
    relative_totals,
)
from qlora_lab.measure.replay import CHATGPT, Replay, counts, relative_score, replay_results
from qlora_lab.memory.published import replay_published

PAGE = Path(__file__).parent.parent / "docs" / "published.md"
COMMAND = "python -m tools.published_page"
HEAD = f"""# Published figures, computed again

Papers and slides print means, ranks, ratios and intervals that follow from other numbers which they print as well, or \
from judgments that their authors published. This page computes them again from the tables in `data/published`, whose \
README describes each file, and lists every figure that does not come out.

A figure is **reproduced** if ours, rounded to the printed number of decimal places, has the same digits. A figure \
printed as "about 30" is held to the same rule, so part of the list is only generous rounding: read the last column.

```python
from qlora_lab.measure.replay import counts, replay_results

replays = replay_results()
print(counts(replays))
[replay for replay in replays if replay.reason]
```

`qlora_lab.replay_published()` does the same for memory figures. `{COMMAND}` writes this page, and a test fails if it \
is out of date.
"""
TRAPS = """
## Reading the judgments

The QLoRA authors published GPT-4's judgments, one file for each ordered pair of systems. `guanaco_*.csv` holds their \
counts and sums. Three things in the files are easy to get wrong:

1. **Order.** Where the name of a system begins with a size, the order is reversed: `65b-guanaco ... vs gpt-3.5` \
stores ChatGPT's answer and score first. For Bard, GPT-4 and Vicuna the order is that of the name. The ids of \
the answers show it, in all 72 files. `RelativeTotals.scores()` puts both kinds in order.
2. **Zero is a score.** An empty answer got it. Only -1 means that no score could be read.
3. **Missing questions.** Some files have three questions without scores. Table 6 then takes the other order alone for \
these questions: with the totals of both orders instead, the means of Alpaca 13B and Self-Instruct 13B do not come out.
"""


def page() -> str:
    """Return docs/published.md."""
    results, memory = replay_results(), replay_published()
    parts = [HEAD, summary(results, memory), failures("What does not come out", results)]
    parts += [failures("Memory figures that do not come out", memory), unanswered(results), TRAPS, position()]
    return "".join([*parts, intervals(), conclusions(), llava()])


def table(heads: list[str], rows: Iterable[list[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def summary(results: tuple[Replay, ...], memory: tuple[Replay, ...]) -> str:
    groups = {
        "tables 1 and 7: ratings, ranks, memory": ("elo", "memory"),
        "tables 4 and 5: MMLU": ("mmlu.mean", "mmlu.table5"),
        "table 6: chatbots beside ChatGPT": ("chatgpt.",),
    }
    rows, left = [], list(results)
    for name, keys in groups.items():
        chosen = [replay for replay in left if replay.key.startswith(keys)]
        left = [replay for replay in left if replay not in chosen]
        rows.append([name, *_counted(chosen)])
    rows += [["numbers in sentences", *_counted(left)], ["**results**", *_counted(results)]]
    rows.append(["**memory**", *_counted(memory)])
    heads = ["figures", "computed again", "reproduced", "not computed"]
    return f"\n## How many come out\n\n{table(heads, rows)}"


def _counted(replays: Iterable[Replay]) -> list[str]:
    found = counts(replays)
    return [str(found.replayed), str(found.reproduced), str(found.open)]


def failures(title: str, replays: Iterable[Replay]) -> str:
    rows, before = [], ""
    for one in (one for one in replays if one.reason):
        printed = f"{one.published} {one.unit}".strip()
        reason = "as above" if one.reason == before else one.reason
        rows.append([one.what, _place(one.source), printed, _ours(one), reason])
        before = one.reason
    return f"\n## {title}\n\n{table(['figure', 'where', 'printed', 'ours', 'why'], rows)}"


def _place(source: str) -> str:
    short = source.partition(":")[0]  # memory.json says more of its sources
    return short.replace("QLoRA (arXiv 2305.14314), ", "").replace("; the slides print it too", ", slides")


def _ours(one: Replay) -> str:
    """One decimal place more than printed, if there is one: enough to see how far off it is."""
    places = len(one.published.partition(".")[2]) + 1
    return f"{one.ours:.{places}f}".removesuffix("0").removesuffix(".")


def unanswered(replays: Iterable[Replay]) -> str:
    open_ones = sorted((one for one in replays if one.ours is None), key=lambda one: one.formula)
    lines = []
    for formula, group in groupby(open_ones, key=lambda one: one.formula):
        kinds = Counter(one.what.partition(" of ")[0] for one in group)
        lines.append(f"- {formula}: {'; '.join(f'{kind} ({n})' for kind, n in kinds.items())}\n")
    words = "These figures need more than the tables. `published_games()` has the games of the tournaments.\n\n"
    return f"\n## What is not computed here\n\n{words}{''.join(lines)}"


def position() -> str:
    """How often the answer that the judge reads first wins."""
    rows = []
    for benchmark, name in (("vicuna", "Vicuna"), ("oa", "Open Assistant")):
        games = published_games(benchmark)
        cells = [f"{(games.verdicts == verdict).sum():,}" for verdict in range(4)]
        rows.append([name, f"{len(games):,}", *cells])
    heads = ["benchmark", "games", "first answer wins", "second wins", "ties", "not read"]
    ratios = {}  # system, is it read first -> its score over that of ChatGPT
    for scores in (row.scores() for row in relative_totals()):
        (system,) = set(scores) - {CHATGPT}
        ratios[system, next(iter(scores)) == system] = scores[system] / scores[CHATGPT]
    systems = [system for system, first in ratios if first]
    gain = sum(ratios[system, True] > ratios[system, False] for system in systems)
    words = f"So do scores: {gain} of {len(systems)} systems score higher beside ChatGPT when they are read first.\n"
    return f"\nMore games are won by the answer that is read first:\n\n{table(heads, rows)}\n{words}"


def intervals() -> str:
    """The intervals of table 6 beside those of a paired comparison."""
    sums = {row.system: row for row in published("guanaco_relative_questions.csv", RelativeQuestions)}
    rows = []
    for row in published("chatgpt.csv", Chatbot):
        score = relative_score(sums[row.counted])
        name = f"{row.system} {row.size}".strip()
        halves = f"{score.printed_half:.1f}", f"{score.paired_half:.1f}"
        rows.append([name, row.mean, f"{score.percent:.1f}", row.interval, *halves])
    words = (
        "The paper does not say how the intervals of table 6 were made. One rule gives all of them but that of Open "
        "Assistant: the lower end of the system's own interval over the upper end of ChatGPT's, taken from the ratio. "
        "It treats the errors of the two means as perfectly opposed, and so each interval is too wide. The last column "
        "has the half-width for a ratio of two means over the same questions. Both speak of questions like these 80 "
        "and of this judge alone.\n"
    )
    heads = ["system", "printed mean, %", "ours", "printed half-width", "by this rule", "paired"]
    return f"\n## The intervals of table 6\n\n{words}\n{table(heads, rows)}"


def conclusions() -> str:
    rows = [(f"{row.data_type}: {row.perplexity}", row) for row in published("perplexity.csv", Perplexity)]
    rows += [(f"{row.method}, {row.data_type}, {row.model}: {row.value}", row) for row in published("glue.csv", Glue)]
    cells = [[what, _place(row.source), row.erratum] for what, row in rows if row.erratum]
    words = (
        "Figures of tables 2 and 3 were measured, and nothing published gives them. What was made of some of them:\n"
    )
    return f"\n## Conclusions to be careful with\n\n{words}\n{table(['figure', 'where', 'remark'], cells)}"


def llava() -> str:
    rows = []
    for row in published("llava.csv", LlavaFinding):
        stated = f"{row.value} {row.unit}".strip()
        rows.append([row.topic, row.before, row.after, row.finding, stated, row.erratum])
    first = published("llava.csv", LlavaFinding)[0]
    words = f"As the {first.source} states it. The study behind it: {first.primary}. Only its abstract was compared.\n"
    heads = ["topic", "from", "to", "finding", "stated", "remark"]
    return f"\n## Scaling LLaVA\n\n{words}\n{table(heads, rows)}"


if __name__ == "__main__":
    replace_text(PAGE, page())
