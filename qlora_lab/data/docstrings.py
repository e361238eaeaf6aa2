"""Docstrings: an instruction data set that is already on this machine.

In: names of installed libraries. Out: examples "Write the one-line summary of this Python function." + the function
without its docstring -> the first sentence of that docstring, written by the library's authors.

Files are parsed with `ast` and never imported. A function becomes a pair if
- its docstring opens with a sentence: a capital, 3 to 30 words, a full stop (fragments teach no form of answer);
- that sentence describes: it does not point elsewhere ("See ...", "Alias of ...", deprecation notes) and holds no
  markup of a section or an example ("Args:", "-----", ">>>", "::");
- its code says something: a body besides the docstring, `pass` and `...`, 60 to 1,500 characters (about 20 to 450
  tokens, so that a batch on a CPU takes seconds);
- it is the first with this code: exact duplicates are dropped.

Pairs are sorted by a hash of each: the first N are a fair sample of all libraries, for any N, and the same on every
machine that has the same versions. Other versions hold other functions, hence other pairs.

Not here: classes and modules, whose "code" would be the whole file; tokens (tokens.py) and labels (labels.py).
"""

import ast
import gc
import hashlib
import importlib.util
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm

from qlora_lab.data.examples import Example

TRAIN = ("numpy", "scipy", "torch")
TEST = ("matplotlib",)  # never trained on: progress there is not memorised
STANDARD_LIBRARY = "stdlib"
INSTRUCTION = "Write the one-line summary of this Python function."

SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "idle_test", "lib2to3"}  # tests, and test data in Python 2
    | {"site-packages", "dist-packages", "__pycache__"}  # the standard library's folder holds other people's packages
    | {"_vendor", "_external", "externals", "array_api_compat", "array_api_extra"}  # copies of other libraries
    | {"_inductor", "_dynamo"}  # torch's compiler: a third of its source, and nothing that users of torch call
)
CODE_CHARACTERS = range(60, 1501)
SUMMARY_WORDS = range(3, 31)

# A full stop ends a sentence before white space and an opening character, but not in "e.g." and "i.e.".
SENTENCE_END = re.compile(r"(?<!e\.g\.)(?<!i\.e\.)(?<=[.!?])\s+(?=[A-Z`*\"'(])")
POINTER = re.compile(r"(?i)^(see|refer|same as|equivalent|internal)\b|\b(alias|deprecated)\b")
MARKUP = re.compile(r"::|>>>|--|\.\.\.|\b(Args|Parameters|Returns|Notes?|Examples?):|\b(TODO|FIXME|XXX)\b")

_READ: dict[str, list[tuple[str, str]]] = {}  # kept: torch takes 5 s, and a notebook asks for both splits repeatedly


def docstring_split(split: str, progress: bool = True) -> list[Example]:
    """Return the pairs of TRAIN or TEST. No function of TEST is in "train", even where a library copied its code.

    Raises ValueError for any other split.
    """
    if split not in ("train", "test"):
        raise ValueError(f'unknown split {split!r}: the docstrings have "train" and "test"')
    test = docstring_pairs(TEST, progress)
    if split == "test":
        return test
    held_out = {example.prompt for example in test}  # the code, whatever its docstring
    return [example for example in docstring_pairs(TRAIN, progress) if example.prompt not in held_out]


def docstring_pairs(libraries: Iterable[str], progress: bool = True) -> list[Example]:
    """Return all pairs of the named libraries ("stdlib": the standard library), without duplicates, in hash order.

    Raises ValueError for a library that is not installed.
    """
    pairs: dict[str, str] = {}
    for library in libraries:
        for code, summary in _library_pairs(library, progress):
            pairs.setdefault(code, summary)  # the first library keeps a function that others copied
    prompts = {f"{INSTRUCTION}\n\n```python\n{code}\n```": summary for code, summary in pairs.items()}
    examples = [Example((("user", prompt), ("assistant", summary))) for prompt, summary in prompts.items()]
    return sorted(examples, key=lambda example: hashlib.sha256(repr(example.messages).encode()).digest())


def _library_pairs(library: str, progress: bool) -> list[tuple[str, str]]:
    if library not in _READ:
        files = list(_python_files(_folder(library)))
        bar = tqdm(files, f"docstrings of {library}", unit="file", leave=False, disable=not progress)
        with _paused_collector():
            _READ[library] = [pair for path in bar for pair in _pairs(path)]
    return _READ[library]


@contextmanager
def _paused_collector() -> Iterator[None]:
    """Pause garbage collection: each run would walk millions of tree nodes, and torch's objects too (24 s, not 11)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _folder(library: str) -> Path:
    if library == STANDARD_LIBRARY:
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(library)  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f'no installed package is called {library!r}: install it, or use "{STANDARD_LIBRARY}"')
    return Path(spec.submodule_search_locations[0])


def _python_files(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)  # in place: os.walk goes only there, in this order
        yield from (Path(parent, name) for name in sorted(files) if name.endswith(".py"))


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (code, summary) for each function of one file that passes the filters."""
    try:
        text = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in a library's files do not concern our user
            tree = ast.parse(text)
    except (SyntaxError, ValueError):  # templates and samples that are not Python, despite their name
        return
    lines = text.split("\n")  # as ast counts lines; splitlines() also splits at form feeds
    for function in _functions(tree.body):
        summary = _encodable(first_sentence(ast.get_docstring(function) or ""))
        code = code_without_docstring(function, lines)
        says_nothing = all(map(_is_filler, function.body[1:]))  # besides the docstring
        if is_summary(summary) and len(code) in CODE_CHARACTERS and not says_nothing:
            yield code, summary


def _encodable(text: str) -> str:
    """Return the text, or "" if it holds half of a surrogate pair, which a string literal can spell."""
    return text if text.encode("utf-8", "ignore").decode() == text else ""


def _functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield functions, methods and nested functions in source order, visiting statements only: 5 times ast.walk."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        for part in ("body", "handlers", "orelse", "finalbody", "cases"):
            yield from _functions(getattr(node, part, []))


def first_sentence(docstring: str) -> str:
    """Return the first sentence of the first paragraph, on one line."""
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    return SENTENCE_END.split(" ".join(paragraph.split()), maxsplit=1)[0]


def is_summary(sentence: str) -> bool:
    """Tell whether a sentence states what a function does; the rules are in the module docstring."""
    words = len(sentence.split())
    well_formed = sentence[:1].isupper() and sentence.endswith(".") and words in SUMMARY_WORDS
    return well_formed and not POINTER.search(sentence) and not MARKUP.search(sentence)


def code_without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """Return the author's lines from `def` on, without the docstring's, moved to the left margin; comments stay.

    Decorators are left out. A docstring that shares a line with code takes that code along, which leaves too little.
    """
    docstring = function.body[0]
    kept = lines[function.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : function.end_lineno]
    indent = function.col_offset  # of a method
    return "\n".join(line[indent:] if line[:indent].isspace() else line for line in kept).rstrip()


def _is_filler(statement: ast.stmt) -> bool:
    match statement:
        case ast.Pass() | ast.Expr(ast.Constant()):
            return True
        case ast.Raise():
            return "NotImplemented" in ast.dump(statement)
    return False
