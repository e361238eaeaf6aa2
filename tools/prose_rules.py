"""Check what a notebook's prose claims against its cells: [(number, cell, source)] -> sentences, as notebook_rules.

- A number comes from a stored output or a code cell of the notebook, where it may be more precise or not yet in
  percent. If it comes from elsewhere, its paragraph, or the one before its list, names the source: a link, a file of
  bench/ or docs/, a paper, slides, another notebook.
- "Twice as large", "20 times less": two numbers of the output above have this ratio, or code of the section has it.
- What beats another does not tie with it elsewhere.
- A notebook that is promised is linked.

Not checked: controls ("- **Name**: 1 to 16"), which show their range themselves, numbers up to ten in words, and what
comes before the first output. Not found: a wrong comparison without a number ("larger", "wins"), a number that the
notebook holds in another meaning, and a claim that holds only on some machines. For these there are guards.
"""

import re

_NO_PROSE = re.compile(r"`[^`]*`|</?\w+[^>]*>|\bnotebooks? \d\d\b|(?<![\d.,])0\d\w*|^\s*(\*\*)?\d+\.(?=\s|\*)", re.M)
_ENTRY = r"\s*(?:- |\d+\. )"  # of a list
_CONTROL = re.compile(r"\s*- \*\*[^*]+\*\*:")
_SOURCE = re.compile(r"\]\(|arXiv|[Pp]aper|[Ss]lides?\b|data sheet|\(\d\d\)|\b(bench|docs)/|\((\D*, )?(19|20)\d\d\)")
_GLOSSARY = re.compile(r"\[([^]]*)\]\((?:\.\./)?glossary\.md#[\w-]+\)")  # explains a word, and is no source
_NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)")
_LITERAL = re.compile(r"(?<![\w.])\d[\d_,]*(?:\.\d+)?(?:e[-+]?\d+)?")
_POWER = re.compile(r"(?<![\w.)])(\d+) ?\*\* ?(\d+)\b")
_UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_UNITS += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_COMPOUND = [word for ten in _TENS for word in (ten, *(f"{ten}-{unit}" for unit in _UNITS[1:10]))]
_WORDS = {word: value for value, word in enumerate([*_UNITS, *_COMPOUND])}
_MULTIPLE = re.compile(r"(more than )?\b(?:(twice)|([\w.-]+) times) (?:as|more|less)\b", re.I)
_PROMISE = re.compile(r"\b(?:later|next|another|coming) notebook\b")


def unsupported(cells):
    """Every claim that nothing in the notebook holds up."""
    for rule in (_numbers, _multiples, _verdicts, _promises):
        yield from rule(cells)


def _numbers(cells):
    held = {v for _, cell, source in cells if cell["cell_type"] == "code" for v in values(f"{source} {_printed(cell)}")}
    first = next((i for i, cell, _ in cells if cell.get("outputs")), len(cells))
    for i, text, sourced in _paragraphs(cells):
        if i < first or sourced or _CONTROL.match(text):
            continue
        for said, value, decimals in _stated(text):
            units = (1, 100) if re.search(rf"{re.escape(said)} ?%", text) else (1,)
            if not any(round(known * unit, decimals) == value for known in held for unit in units):
                found = f"cell {i}: no output and no cell has the number {said!r}"
                yield f"{found}. Print it, assert it in a guard, mend it, or name its source beside it."


def _multiples(cells):
    for section in _sections(cells):
        in_code = {v for _, cell, source in section if cell["cell_type"] == "code" for v in values(source)}
        shown = []
        for i, cell, source in section:
            shown = values(_printed(cell)) or shown
            for _, text, sourced in _paragraphs([(i, cell, source)]):
                stated = [value for _, value, _ in _stated(text)]
                for said, ratio, most in () if sourced else _ratios(text):
                    if ratio not in in_code and not any(_has_ratio(v, ratio, most) for v in (shown, stated)):
                        yield f"cell {i}: the output above does not show {said!r}. Mend it, or assert it in a guard."


def _verdicts(cells):
    said = [(i, sentence) for i, text, _ in _paragraphs(cells) for sentence in re.split(r"(?<=[.:?])\s", text)]
    ties = [set(re.findall(r"[\w-]+", sentence)) for _, sentence in said if re.search(r"\bties?\b", sentence)]
    for i, sentence in said:
        for better, worse in re.findall(r"([\w-]+) beats ([\w-]+)", sentence):
            if any({better, worse} <= names for names in ties):
                yield f"cell {i}: {better} beats {worse} here and ties with it elsewhere. Say one of the two."


def _promises(cells):
    for i, cell, source in cells:
        for sentence in re.split(r"(?<=[.?])\s", source if cell["cell_type"] == "markdown" else ""):
            if _PROMISE.search(sentence) and ".ipynb" not in sentence:
                yield f"cell {i}: a notebook is promised and not linked. Link it, or leave the promise out."


def _sections(cells):
    """The cells from one H2 to the next."""
    starts = [n for n, (_, _, source) in enumerate(cells) if source.startswith("## ")]
    return [cells[a:b] for a, b in zip([0, *starts], [*starts, len(cells)], strict=True)]


def _paragraphs(cells):
    """(number of the cell, paragraph or entry of a list without code, whether it names a source) of the markdown."""
    for i, cell, source in cells:
        whole = _GLOSSARY.sub(r"\1", re.sub(r"^(```|~~~).*?^\1", "", source, flags=re.M | re.S))
        intro = ""
        for text in re.split(rf"\n\s*\n|\n(?={_ENTRY})", whole if cell["cell_type"] == "markdown" else ""):
            intro = intro if re.match(_ENTRY, text) else text
            yield i, _NO_PROSE.sub(" ", text), bool(_SOURCE.search(f"{intro} {text}"))


def _stated(text):
    """(as written, value, decimals) of each number in a paragraph, in digits or in words above ten, but no multiple."""
    text = _MULTIPLE.sub(" ", text)
    for said in _NUMBER.findall(text):
        yield said, float(said.replace(",", "")), 20 if "e" in said else len(said.partition(".")[2])
    for said in re.findall(r"[a-z]+(?:-[a-z]+)?", text.lower()):
        if _WORDS.get(said, 0) > 10:
            yield said, float(_WORDS[said]), 0


def _ratios(text):
    """(as written, smallest ratio, largest ratio) of each multiple that a paragraph states; a question states none."""
    for sentence in re.split(r"(?<=[.:?])\s", text):
        for match in () if sentence.rstrip().endswith("?") else _MULTIPLE.finditer(sentence):
            number = match[3] or "two"
            value = float(number) if _NUMBER.fullmatch(number) else _WORDS.get(number.lower())
            if value is not None:  # "many times" is none
                yield match[0], value, 1.5 if match[1] else 1.15


def _has_ratio(numbers, ratio, most):
    """Whether one number is `ratio` times another: "nearly twice" is 1.8, and "more than twice" up to three times."""
    return any(0.85 < a / b / ratio < most for a in numbers for b in numbers if b)


def values(text):
    """All numbers in code or in an output; a power counts as its value."""
    powers = [int(base) ** int(exponent) for base, exponent in _POWER.findall(text)]
    return powers + [float(re.sub("[_,]", "", said)) for said in _LITERAL.findall(_POWER.sub(" ", text))]


def _printed(cell):
    """The text of a cell's outputs."""
    outputs = cell.get("outputs", [])
    return " ".join("".join(o.get("text", "") or o.get("data", {}).get("text/plain", "")) for o in outputs)
