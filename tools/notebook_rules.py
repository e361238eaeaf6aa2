"""Check the rules that every notebook of the course keeps: a stored notebook (as JSON) -> the rules it breaks.

In: the notebook's dict. Out: a list of sentences, "cell N: what is wrong, what to do".

The first rule closes silent gaps of nbval 0.11.0, which compares nothing in a cell that was never run, and cannot
compare what goes through an Output widget. The other rules are the course's own.

Not here: what the prose claims (prose_rules.py), running notebooks (notebooks.py), comparing their outputs (nbval).
"""

import ast
import json
import re

from tools.prose_rules import unsupported

LONGEST_CELL = 10
TITLE_WORDS = 4  # of a figure, at least: a bare label has fewer, a claim has more
LARGEST = 250_000  # bytes: a code host shows it, and a change to it can be read
OPENING = ("You need", "Runs in", "Paper section", "After this you can")
TAIL = ["Check yourself", "Exercises", "What we left out", "Next"]
_NOT_COMPARED = re.compile(r"\bOutput\(|\binteract(ive_output|_manual)?\(|@interact\b|clear_output\(|display_id=")
_BANNED = re.compile(r"^\s*[%!]\s*(pip|conda)\b|%autoreload|%load_ext autoreload|filterwarnings|simplefilter", re.M)
_BY_HAND = re.compile(r"\bby[ _]hand\b", re.I)
_GUESS = re.compile(r"^(\w+) = ql\.guess\(", re.M)
_LIVE = re.compile(r"Run this cell to (guess|play)\.")  # below the still of a guess box or an explorer
_ALT = re.compile(r"\balt\s*=\s*(\"[^\"]*[^\"\s][^\"]*\"|'[^']*[^'\s][^']*')")


def problems(notebook):
    """Every rule that the notebook breaks, in the order of its cells."""
    cells = [(i, c, "".join(c["source"])) for i, c in enumerate(notebook["cells"])]
    rules = (_runs, _code, _asserts, _images, _titles, _headings, _opening, _answers, unsupported)
    return [sentence for rule in rules for sentence in rule(cells)] + list(_size(notebook))


def unsolved(notebook):
    """Checks of a solution notebook that do not print "correct": each check must accept its solution."""
    for i, cell in enumerate(notebook["cells"]):
        printed = "".join("".join(output.get("text", "")) for output in cell.get("outputs", []))
        if "check(" in "".join(cell["source"]) and ": correct" not in printed:
            yield f"cell {i}: the solution does not pass its own check. Mend the answer or the check."


def _code_cells(cells):
    return [(i, c, source) for i, c, source in cells if c["cell_type"] == "code" and source.strip()]


def _runs(cells):
    for want, (i, cell, source) in enumerate(_code_cells(cells), 1):
        tags = cell["metadata"].get("tags", [])
        if cell["execution_count"] != want:
            number = cell["execution_count"]
            yield f"cell {i}: run number {number}, not {want}; nbval would compare nothing. Run `make notebooks`."
        if "raises-exception" not in tags and any(o["output_type"] == "error" for o in cell["outputs"]):
            yield f"cell {i}: an error is stored. Mend the cell, or tag it raises-exception if the error is the lesson."
        if _NOT_COMPARED.search(source):
            yield f"cell {i}: nbval cannot compare Output, interact, clear_output, display_id. Use an Explorer."


def _code(cells):
    for number, (i, _, source) in enumerate(_code_cells(cells)):
        lines = source.rstrip().splitlines()
        if len(lines) > LONGEST_CELL:
            yield f"cell {i}: {len(lines)} lines, at most {LONGEST_CELL}. Split it, or move code into the library."
        if _BANNED.search(source):
            yield f"cell {i}: installs, warning filters and autoreload stay out of notebooks."
        if number and any(isinstance(s, (ast.Import, ast.ImportFrom)) for s in _statements(source)):
            yield f"cell {i}: imports belong in the first code cell, and only there."


def _asserts(cells):
    """An assertion in sight compares a result by hand with the library's: its cell or the prose right above says so."""
    for place, (i, cell, source) in enumerate(cells):
        if cell["cell_type"] == "code" and "guard" not in _tags(cell) and _checks(source):
            above = cells[place - 1 : place]  # nothing above the first cell
            prose = "".join(text for _, c, text in above if c["cell_type"] == "markdown")
            if not _BY_HAND.search(source + prose):
                unsaid = 'an assertion is in sight, but neither its cell nor the prose right above says "by hand"'
                yield f"cell {i}: {unsaid}. Print both values, or move it to a guard."


def _checks(source):
    """Whether code asserts something, by the statement or by a function such as torch.testing.assert_close."""
    nodes = [node for statement in _statements(source) for node in ast.walk(statement)]
    called = [ast.unparse(node.func).rpartition(".")[2] for node in nodes if isinstance(node, ast.Call)]
    return any(isinstance(node, ast.Assert) for node in nodes) or any(name.startswith("assert") for name in called)


def _images(cells):
    for i, cell, source in cells:
        pages = [source] if cell["cell_type"] == "markdown" else []
        pages += ["".join(o.get("data", {}).get("text/html", "")) for o in cell.get("outputs", [])]
        tags = [tag for page in pages for tag in re.findall(r"<img\b[^>]*>", page)]
        if any(not _ALT.search(tag) for tag in tags) or any(re.search(r"!\[\s*\]\(", page) for page in pages):
            yield f"cell {i}: an image has no alt text. Say what it shows, with its key numbers."
        if any(kind.startswith("image/") for o in cell.get("outputs", []) for kind in o.get("data", {})):
            yield f"cell {i}: an image is stored outside of HTML, where its alt text is lost. Show it with picture()."


def _titles(cells):
    """A figure says its idea above itself. Its stored pixels cannot be asked, so the code that draws it is."""
    drawing = []
    for i, _, source in _code_cells(cells):
        calls = [node for part in _statements(source) for node in ast.walk(part) if isinstance(node, ast.Call)]
        named = {ast.unparse(call.func).rpartition(".")[2] for call in calls}
        drawing = calls if "new_figure" in named else drawing + calls
        if "picture" in named and max(map(_title_words, drawing)) < TITLE_WORDS:
            said = "a figure has no title that says what it shows"
            yield f"cell {i}: {said}. Write one of {TITLE_WORDS} words or more: ax.set_title(...)."


def _title_words(call):
    """How many words a call writes above a figure: set_title, suptitle, or `title=`, in plain or formatted text."""
    above = not ast.unparse(call.func).endswith("legend")  # a legend's title is none of the figure
    given = [keyword.value for keyword in call.keywords if keyword.arg == "title" and above]
    if isinstance(call.func, ast.Attribute) and call.func.attr in ("set_title", "suptitle"):
        given += call.args[:1]
    parts = [node for text in given for node in ast.walk(text)]
    texts = [node.value for node in parts if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return len(" ".join(texts).split())


def _headings(cells):
    outline = [(i, level, text) for i, c, s in cells if c["cell_type"] == "markdown" for level, text in headings(s)]
    titles = [text for _, level, text in outline if level == 1]
    if len(titles) != 1 or not titles[0].endswith("?"):
        yield f"the notebook needs exactly one H1, a question (ending in '?'); it has {titles}."
    for (_, before, _), (i, level, text) in zip(outline, outline[1:], strict=False):
        if level > before + 1:
            yield f"cell {i}: heading {text!r} jumps from level {before} to {level}."
    if [text for _, level, text in outline if level == 2][-len(TAIL) :] != TAIL:
        yield f"the last four H2 headings are {', '.join(TAIL)}, in this order."


def _opening(cells):
    codes = _code_cells(cells)
    first = codes[0][0] if codes else len(cells)
    opening = "\n".join(source for i, _, source in cells if i < first)
    for label in OPENING:
        if label not in opening:
            yield f"the opening, before the first code cell, needs a line {label!r}."
    if not cells or not cells[0][2].startswith("# "):
        yield "cell 0: the notebook starts with its H1."
    statements = _statements(codes[0][2]) if codes else []
    others = [s for s in statements if not isinstance(s, (ast.Import, ast.ImportFrom))]
    if len(others) == len(statements) or not all(map(_sets_environment, others)):
        yield f"cell {first}: the first code cell holds the imports, environment variables for them, and nothing else."


def _sets_environment(statement):
    """os.environ["NAME"] = "text": some libraries read a switch when they are imported."""
    name = isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0])
    return bool(name) and name.startswith("os.environ[") and isinstance(statement.value, ast.Constant)


def _answers(cells):
    """A question to predict has a guess, and its answer is out of sight: a click or a run shows it."""
    for place, (i, cell, source) in enumerate(cells):
        is_code = cell["cell_type"] == "code"
        if "answer" in _tags(cell):
            hidden = cell["metadata"].get("jupyter", {}).get("outputs_hidden") if is_code else source[:9] == "<details>"
            if not hidden:
                yield f"cell {i}: an answer is in sight. Hide the output of code (outputs_hidden), or use <details>."
        elif not is_code and "**Predict" in source and not _guesses(cells[place + 1 : place + 2]):
            yield f"cell {i}: the question to predict has no guess. Ask in the next cell: name = ql.guess(...)."
        names = _guesses(cells[place : place + 1])
        if names and not _asks_or_plays(cell):
            yield f"cell {i}: a guess shows more than its box. Move the rest behind the answer."
        for name in names:
            yield from _comparison(i, name, cells[place + 1 :])
            yield from _bound_again(i, name, cells[:place] + cells[place + 1 :])


def _bound_again(i, name, others):
    """Cells that give the guess's name to something else: who goes back to the answer would compare that."""
    for at, _, source in _code_cells(others):
        for statement in _statements(source):
            # what a function binds in its body is its own
            if isinstance(statement, ast.FunctionDef):
                bound = {statement.name}
            else:
                names = (node for node in ast.walk(statement) if isinstance(node, ast.Name))
                bound = {node.id for node in names if isinstance(node.ctx, ast.Store)}
            if name in bound:
                yield f"cell {at}: it binds {name} again, the guess of cell {i}. Take another name."


def _guesses(cells):
    """Names of the guesses that these cells ask for."""
    return [name for _, c, s in cells if c["cell_type"] == "code" for name in _GUESS.findall(s)]


def _comparison(i, name, following):
    """What stands in sight between the guess in cell `i` and the answer that compares it, both in one section.

    Markdown without the tag `answer`, in between or after a hidden answer, cannot be judged: read it for spoilers.
    """
    shown = []
    for at, cell, source in following:
        if source.startswith("## "):
            break
        if re.search(rf"\b{name}\.compare\(", source):
            if "answer" not in _tags(cell):
                seen = f"cell {at}: the comparison with the guess {name} is in sight"
                shown.append(f"{seen}. Tag it `answer`, and hide its output.")
            return shown
        if "answer" not in _tags(cell) and not _asks_or_plays(cell):
            seen = f"cell {at}: an output stands in sight between the guess {name} and its answer"
            shown.append(f"{seen}. Move it behind the answer.")
    return [f"cell {i}: nothing compares the guess. Let an answer of its section end in {name}.compare(...)."]


def _asks_or_plays(cell):
    """Whether a cell shows nothing, or only guess boxes and explorers, in which the reader looks for the answer."""
    bundles = [output.get("data", {}) for output in cell.get("outputs", [])]
    pages = ["".join(data.get("text/html", data.get("text/plain", ""))) for data in bundles]
    return all(map(_LIVE.search, pages))


def _tags(cell):
    return cell["metadata"].get("tags", [])


def _size(notebook):
    size = len(json.dumps(notebook, indent=1, ensure_ascii=False).encode())
    if size > LARGEST:
        rule = f"the notebook has {size:,} bytes, at most {LARGEST:,}"
        yield f"{rule}. Run `make notebooks`, which stores smaller pictures, or leave one out."


def headings(markdown):
    """[(level, text)] of the # headings outside fenced code."""
    prose = re.sub(r"^(```|~~~).*?^\1", "", markdown, flags=re.M | re.S)
    return [(len(marks), text.strip()) for marks, text in re.findall(r"^(#{1,6})\s+(.*)$", prose, re.M)]


def _statements(source):
    """Top-level statements, without lines of IPython magic."""
    plain = re.sub(r"^\s*[%!].*$", "pass", source, flags=re.M)
    try:
        return ast.parse(plain).body
    except SyntaxError:
        return []
