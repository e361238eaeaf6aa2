"""Multiple choice in words: the prompt of a question and the texts that may follow it. Two ways to ask:

letters: the prompt lists the four options, and the answers are " A" to " D", as in MMLU's own evaluation
  (D. Hendrycks et al., ICLR 2021; github.com/hendrycks/test, evaluate.py). Its first line reads "about  abstract
  algebra" with two spaces; that is kept, because one space less is another prompt.
texts: the prompt holds the question alone, and the answers are the texts of the options ("cloze"). Small models know
  more than they can say in letters. The prompt is that of lm-evaluation-harness' mmlu_continuation. A long text is less
  likely than a short one, so it is also judged per character and per byte.

In: Questions. Out: texts, with n worked examples before each question.
Not here: their tokens and log-likelihoods (measure/multiple_choice.py).
"""

from dataclasses import dataclass, replace

from qlora_lab.data.choice_files import LETTERS, ChoiceQuestion, Questions
from qlora_lab.quant.numbers import check_whole

WAYS = ("letters", "texts")
SHOTS = 5  # MMLU's number
# evaluate.py joins the words of a subject with a space before each, and has one more in its sentence: two.
HEADERS = {
    "letters": "The following are multiple choice questions (with answers) about  {}.\n\n",
    "texts": "The following are questions (with answers) about {}.\n\n",
}


@dataclass(frozen=True)
class Task:
    """What is asked, and how. way: "letters" or "texts". shots: examples in a prompt; None: SHOTS."""

    questions: Questions
    shots: int | None = None
    way: str = "letters"

    def checked(self) -> "Task":
        """Return the task with its number of examples: 0 for a file of whole prompts, which hold their own.

        Raises ValueError for another way to ask, no questions, an empty option among texts, or a choice that whole
        prompts do not leave.
        """
        name = self.questions.name
        if self.way not in WAYS:
            raise ValueError(f"way={self.way!r} is not known: choose from {', '.join(WAYS)}")
        if not self.questions.test:
            raise ValueError(f"{name} holds no questions: name a folder or a file that does")
        # A file holds whole prompts or none, so the first question tells.
        if self.questions.test[0].prompt is not None:
            if self.way == "texts":
                raise ValueError(f"{name} holds whole prompts, which list the options: take --answers letters")
            if self.shots:
                raise ValueError(f"{name} holds whole prompts, examples included: leave out --shots")
            return replace(self, shots=0)
        # Five if nobody says: MMLU's published accuracies are with five.
        shots = SHOTS if self.shots is None else self.shots
        check_whole("shots", shots, 0)
        # A letter can stand for nothing ("none of these"); a text of no characters has no likelihood per character.
        for question in self.questions.test if self.way == "texts" else ():
            for letter, option in zip(LETTERS, question.options, strict=True):
                if not option.strip():
                    where = question.where or f"{name}, {question.subject}: {question.text[:40]!r}"
                    raise ValueError(f"{where}: option {letter} is empty: give it a text, or take --answers letters")
        return replace(self, shots=shots)


def header(subject: str, way: str) -> str:
    """Return the first line of a prompt. Underscores in the subject are spaces.

    >>> header("abstract_algebra", "letters")
    'The following are multiple choice questions (with answers) about  abstract algebra.\\n\\n'
    """
    return HEADERS[way].format(subject.replace("_", " "))


def prompt(question: ChoiceQuestion, way: str) -> str:
    """Return a question as it stands in a prompt, up to "Answer:"."""
    if way == "texts":
        return f"Question: {question.text.strip()}\nAnswer:"
    listed = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, question.options, strict=True))
    return f"{question.text}{listed}\nAnswer:"


def answers(question: ChoiceQuestion, way: str) -> tuple[str, ...]:
    """Return the four texts that may follow the prompt; each begins with a space."""
    # With the space: tokenizers have a token for " A", and another one for "A", which models see elsewhere.
    return tuple(f" {text}" for text in (LETTERS if way == "letters" else question.options))


def examples(task: Task, subject: str) -> str:
    """Return the beginning that all prompts of a subject share. Raises ValueError for too few examples."""
    available = task.questions.dev.get(subject, ())
    if len(available) < task.shots:
        found = "an empty" if subject in task.questions.dev else "no"  # to look for a file that is there costs time
        there = f"{f'{len(available)} examples in' if available else found} dev/{subject}_dev.csv"
        fix = f"take --shots {len(available)}, or add examples"
        raise ValueError(f"{task.questions.name}: {subject!r} has {there}, but shots={task.shots}: {fix}")
    # The first ones of the file, as in the original: drawn ones would be another benchmark.
    worked = (f"{prompt(q, task.way)}{answers(q, task.way)[q.answer]}\n\n" for q in available[: task.shots])
    return header(subject, task.way) + "".join(worked)
