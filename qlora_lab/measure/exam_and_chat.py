"""Set two published judgments of the same models side by side: an exam, and conversations that GPT-4 read.

    exam_and_chat()    -> Tuned(data="FLAN v2", size="13B", mmlu=51.4, chatgpt=47.0), ...: 8 data sets, 4 sizes of LLaMA

In: data/published. Out: percentages.
Source: QLoRA (arXiv 2305.14314), table 5 for MMLU. Of the conversations its table 6 prints only some; the others are
computed from the authors' judgments, by the ratio that gives the printed ones (replay.py).
Not here: the picture (show/results.py).
"""

from dataclasses import dataclass

from qlora_lab.measure.published import Chatbot, Mmlu, RelativeQuestions, published
from qlora_lab.measure.replay import relative_score


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
    # with both orders of reading, so that no system gains by its place
    judged = {row.system: relative_score(row).percent for row in questions}
    # 13B alone has a row for every data set, so it alone says what the judgments call each: "13b-flan" is FLAN v2
    names = {row.system: row.counted for row in published("chatgpt.csv", Chatbot) if row.size == "13B"}
    return tuple(
        Tuned(row.data, row.size, float(row.accuracy), judged[row.size.lower() + names[row.data].removeprefix("13b")])
        for row in published("mmlu.csv", Mmlu)
        if row.table == 5 and row.data != "none"
    )
