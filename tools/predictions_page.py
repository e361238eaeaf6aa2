"""Write docs/predictions.md: every question to predict in the course, its answer and the reason, for teachers.

In: the stored notebooks. Out: the page, by notebook and section. Questions and answers are what the cells of `ql.guess`
and `.compare` show, and reasons are the prose behind "What we saw". A reason without a guess stands under the question
that the notebook's prose asks before it; if there is none, the reason is left out.
"""

import ast
import json
import re
from pathlib import Path

from qlora_lab.files.replace import replace_text
from tools.notebook_rules import headings
from tools.notebooks import UNCOMPARED

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "predictions.md"
COMMAND = "python -m tools.predictions_page"
HEAD = f"""# Questions to predict, and their answers

Students record a guess before the cell that measures. This page has all questions, with what the stored notebooks
measured, for those who [teach the course](teaching.md). What is indented is the explanation that students find below
the answer. An answer marked with \\* can differ on your machine. Questions and explanations are the notebook's own
words: where they speak of a picture or a table, it is in that section of the notebook.

`{COMMAND}` writes this page; a test fails when it is out of date.
"""
_ANSWER = re.compile(r"The answer is (.+)\. \(You recorded no guess\.\)")
_SEEN = re.compile(r"<details>\s*<summary>What we saw</summary>(.*?)</details>", re.S)
_PREDICT = re.compile(r"^(.*)\*\*Predict(?: first)?(?::\*\*|\*\*,)(.*)$", re.M)
_ASKED = re.compile(r"^(?![#<|-]).*\?$", re.M)  # a paragraph that ends with a question
_KEYS = " Run the next cell, choose an answer and press Record."  # how to guess, which follows one question
_UNASKED = " Run this cell to guess."


def page() -> str:
    """The page as Markdown."""
    return HEAD + "".join(map(_section, sorted((ROOT / "notebooks").glob("*.ipynb"))))


def _section(path: Path) -> str:
    """The questions of one notebook, in groups: each ends with its "What we saw"."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    asked = {}  # variable -> [question, choices, answer, what is told before it]
    told = open_question = ""
    section = written = ""  # the heading above a cell, and the one above the last group
    out = []

    def write(*group: str) -> None:
        nonlocal written
        out.extend([f"\n### {section}\n"] * (section != written))
        written = section
        out.extend(group)

    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            new = _questions(cell, source)
            for question in new.values():
                question.append(told)
                told = open_question = ""  # of several questions, the first has it
            asked |= new
            _answer(cell, source, asked)
            continue
        if seen := _SEEN.search(source):
            answered = {name: question for name, question in asked.items() if question[2]}
            # others are answered further down
            asked = {name: question for name, question in asked.items() if name not in answered}
            if answered:
                write(*map(_row, answered.values()), f"\n{_quoted(_moved(seen[1]))}\n")
            elif open_question:
                write(f"\n{_moved(open_question)}\n{_quoted(_moved(seen[1]))}\n")
            source, open_question = source[seen.end() :], ""
        if titles := [title for level, title in headings(source) if level > 1]:
            section, open_question = titles[-1], ""
            source = re.split(rf"^#+\s+{re.escape(section)}[ \t]*$", source, flags=re.M)[-1]
        if predict := _PREDICT.search(source):
            told = _told(predict)
        elif questions := _ASKED.findall(source):
            open_question = questions[-1]
    if asked:  # of a notebook that gives no reason
        write(*map(_row, asked.values()))
    return f"\n## [{path.stem}](../notebooks/{path.name})\n" + "".join(out) if out else ""


def _told(predict: re.Match) -> str:
    """The paragraph that asks, without "Predict first:"."""
    before, question = predict[1].strip(), predict[2].partition(_KEYS)[0].strip()
    return _moved(f"{before} {question[:1].upper()}{question[1:]}".strip())


def _questions(cell: dict, source: str) -> dict[str, list[str]]:
    """What a cell asks, under the name of its variable."""
    assigned = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    known = {ast.unparse(node.targets[0]): node.value for node in assigned}
    asked = {}
    for name, call in known.items():
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "ql.guess":
            choices = call.args[1] if len(call.args) > 1 else None
            choices = known.get(choices.id) if isinstance(choices, ast.Name) else choices
            listed = [value.value for value in choices.elts] if isinstance(choices, ast.List) else []
            asked[name] = [_shown(cell).removesuffix(_UNASKED), " / ".join(listed), ""]
    return asked


def _answer(cell: dict, source: str, asked: dict[str, list[str]]) -> None:
    """Add the answer that a cell has compared with its guess."""
    compared = re.search(r"^(\w+)\.compare\(", source, re.M)
    answer = _ANSWER.search(_shown(cell))
    if compared and answer and compared[1] in asked:
        varies = UNCOMPARED in cell["metadata"].get("tags", [])
        text = answer[1].strip('"')
        asked[compared[1]][2] = f"**{text}**" + r" \*" * varies


def _shown(cell: dict) -> str:
    """The text of a cell's last result."""
    texts = ["".join(output["data"].get("text/plain", "")) for output in cell["outputs"] if "data" in output]
    return texts[-1] if texts else ""


def _row(question: list[str]) -> str:
    text, choices, answer, told = question
    lead = f"\n{told}\n" if told else ""
    return f"{lead}\n- {text}{f' ({choices})' if choices else ''} {answer}"


def _quoted(prose: str) -> str:
    return "\n" + "\n".join(f"> {line}".rstrip() for line in prose.splitlines())


def _moved(prose: str) -> str:
    """Links as they are right in docs/."""
    return re.sub(r"\]\((?:\.\./)?(?=\d\d_\w+\.ipynb|glossary\.md)", "](../notebooks/", prose.strip())


if __name__ == "__main__":
    replace_text(PAGE, page())
