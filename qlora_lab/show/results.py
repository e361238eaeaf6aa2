"""Pictures of results: intervals of any table, and an exam against conversations of the same models.

In: numbers that measure/ has computed, or data/published holds. Out: Pictures, whose alt text holds each number.
Source of the models: QLoRA (arXiv 2305.14314), table 5 for MMLU. Of the conversations its table 6 prints only some; the
others are computed from the authors' judgments, by the ratio that gives the printed ones (measure/replay.py).
"""

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes

from qlora_lab.measure.published import Chatbot, Mmlu, RelativeQuestions, published
from qlora_lab.measure.replay import relative_score
from qlora_lab.show.figure import COLOURS, Picture, new_figure, picture

GRAY = "#767676"  # as pale as text on white may be: contrast 4.5 to 1
LOUD = {"Guanaco": ("blue", "s"), "FLAN v2": ("orange", "D")}  # data sets in colour, with a marker of their own


@dataclass(frozen=True)
class Bar:
    """A value with its interval, in one row of a picture."""

    value: float
    low: float
    high: float
    mark: float | None = None  # another value to compare with, such as a printed one
    note: str = ""  # at the right


def intervals(
    title: str, unit: str, bars: Mapping[str, Bar], *, form: str = ".0f", zero: str = "", marked: str = ""
) -> Picture:
    """Draw a value and its interval in each row, the first one on top.

    bars: name -> Bar, in `unit`. form: how the alt text writes numbers. zero: what 0 means; a line stands there.
    marked: what the marks are.
    """
    # taller with more rows, so that names keep their distance
    fig, ax = new_figure(width=7.5, height=1.5 + 0.42 * len(bars))
    for y, bar in enumerate(bars.values()):
        # No star for "significant": whether two bars overlap is for the reader's eye.
        ax.plot([bar.low, bar.high], [y, y], color=COLOURS["blue"], lw=3)
        ax.plot([bar.value], [y], "o", ms=8, color=COLOURS["blue"])
        if bar.mark is not None:  # 0 is a mark
            ax.plot([bar.mark], [y], "D", ms=7, mfc="none", mew=2, color=COLOURS["orange"])
        # right of the axes, where no interval can reach it
        ax.text(1.02, y, bar.note, transform=ax.get_yaxis_transform(), va="center", fontsize=12)
    # over the bars, so that it shows which of them cross it
    if zero:
        ax.axvline(0, color=COLOURS["black"], lw=1, ls="--")
    ax.set_yticks(range(len(bars)), bars, fontsize=12)
    ax.set(ylim=(len(bars) - 0.5, -0.5))
    # a legend would cover bars, wherever it stood
    label = "; ".join(filter(None, [unit, zero and f"dashed: {zero}", marked and f"diamonds: {marked}"]))
    # the picture's edge would cut a longer line
    ax.set_xlabel(textwrap.fill(label, 60))
    _finish(ax, title)
    return picture(
        fig, f"{title}. In {unit}: {'; '.join(_words(name, bar, form, marked) for name, bar in bars.items())}"
    )


def _words(name: str, bar: Bar, form: str, marked: str) -> str:
    value, low, high = (format(number, form) for number in (bar.value, bar.low, bar.high))
    mark = "" if bar.mark is None else f"{marked} {bar.mark:{form}}"
    return ", ".join(filter(None, [f"{name} {value} ({low} to {high})", mark, bar.note]))


def rank_words(ranks: tuple[int, int]) -> str:
    """Write the best and the worst rank of a system.

    >>> rank_words((3, 5)), rank_words((1, 1))
    ('ranks 3 to 5', 'rank 1')
    """
    best, worst = ranks
    return f"rank {best}" if best == worst else f"ranks {best} to {worst}"


@dataclass(frozen=True)
class Tuned:
    """LLaMA tuned with QLoRA on one data set."""

    data: str
    size: str  # "7B" to "65B"
    mmlu: float  # 5-shot accuracy, %
    chatgpt: float  # GPT-4's scores on 80 questions, in % of those of ChatGPT


def exam_and_chat() -> tuple[Tuned, ...]:
    """Return the models of table 5 that were tuned, in its order. Raises what published raises.

    >>> [model.mmlu for model in exam_and_chat() if model.data == "FLAN v2"]
    [44.5, 51.4, 59.2, 63.9]
    """
    questions = published("guanaco_relative_questions.csv", RelativeQuestions)
    # with both orders of reading, so that no system gains by its position
    judged = {row.system: relative_score(row).percent for row in questions}
    # 13B alone has a row for every data set, so it alone says what the judgments call each: "13b-flan" is FLAN v2
    names = {row.system: row.counted for row in published("chatgpt.csv", Chatbot) if row.size == "13B"}
    return tuple(
        Tuned(row.data, row.size, float(row.accuracy), judged[row.size.lower() + names[row.data].removeprefix("13b")])
        for row in published("mmlu.csv", Mmlu)
        if row.table == 5 and row.data != "none"
    )


def exam_and_chat_picture(models: Iterable[Tuned]) -> Picture:
    """Draw MMLU against conversation for each model, with the two winners in colour."""
    by_data: dict[str, list[Tuned]] = {}
    for model in models:
        by_data.setdefault(model.data, []).append(model)
    fig, ax = new_figure(width=7.5, height=4.2)
    # in the order of the rows, so that a size follows the smaller one along its line
    for data, group in by_data.items():
        colour, mark = LOUD.get(data, (None, "o"))
        exam, chat = [model.mmlu for model in group], [model.chatgpt for model in group]
        # lines for two data sets alone: eight would be a tangle
        style = {"ls": "-", "color": COLOURS[colour], "ms": 8} if colour else {"ls": "none", "color": GRAY, "ms": 6}
        ax.plot(exam, chat, mark, **style)
        for model in group if colour else ():
            ax.annotate(model.size, (model.mmlu, model.chatgpt), (0, -18), textcoords="offset points", ha="center")
        if colour:
            ax.annotate(data, (exam[-1], chat[-1]), (10, 0), textcoords="offset points", va="center", fontsize=12)
    # one entry for all grey dots: which of them is which would not change what the picture says
    others = len(by_data.keys() - LOUD.keys())
    ax.plot([], [], "o", color=GRAY, ms=6, label=f"{others} other data sets, 7B to 65B")
    ax.legend(frameon=False, fontsize=12, loc="upper left")
    ax.set(xlim=(30, 70), ylim=(28, 112))  # room for names on the right and for the key on top
    ax.set_xlabel("MMLU, % right")
    ax.set_ylabel("conversation, % of ChatGPT")
    _finish(ax, "Who is best depends on the exam")
    said = [
        f"{data} " + ", ".join(f"{model.size} {model.mmlu:.1f} and {model.chatgpt:.1f}" for model in group)
        for data, group in by_data.items()
    ]
    return picture(fig, f"MMLU in % right, and conversation in % of ChatGPT, by data set and size: {'; '.join(said)}")


def _finish(ax: Axes, title: str) -> None:
    ax.set_title(title, fontsize=13)
    ax.tick_params(labelsize=12)
    ax.xaxis.label.set_size(12)
    ax.yaxis.label.set_size(12)
