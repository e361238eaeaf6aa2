"""Functions of installed libraries become (code -> summary) pairs; each filter fires on a library made for it."""

import random
import textwrap

import pytest

from qlora_lab.data import docstrings
from qlora_lab.data.docstrings import INSTRUCTION, docstring_pairs, docstring_split, first_sentence, is_summary

BODY = "    total = first + second  # both are floats\n    return total * scale_of(first)"


def function(docstring: str, name: str = "add", body: str = BODY) -> str:
    return f'def {name}(first, second):\n    """{docstring}"""\n{body}\n'


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Installs a package with the given files for this test and returns its name."""

    def install(files: dict[str, str]) -> str:
        name = f"library_{random.randrange(10**12)}"  # its own name: pairs are cached by library
        for path, source in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(source, encoding="utf-8")
        (tmp_path / name / "__init__.py").touch()
        return name

    monkeypatch.syspath_prepend(tmp_path)
    return install


def answers(name: str) -> list[str]:
    return [example.answer for example in docstring_pairs([name])]


def test_a_pair_is_the_authors_code_without_docstring_and_the_first_sentence(library):
    source = '''
        class Sum:
            @property
            def add(self, first: float, second: float = 1.0) -> float:
                """
                Add two numbers, e.g. Two
                floats. Both are scaled.

                Returns: the sum.
                """
                # a comment of the author
                text = """
            less indented, inside a text
                """
                return first + second, text
    '''
    (example,) = docstring_pairs([library({"sums.py": textwrap.dedent(source)})])
    code = (
        "def add(self, first: float, second: float = 1.0) -> float:\n"
        "    # a comment of the author\n"
        '    text = """\n'
        "less indented, inside a text\n"
        '    """\n'
        "    return first + second, text"
    )
    assert example.prompt == (("user", f"{INSTRUCTION}\n\n```python\n{code}\n```"),)
    assert example.answer == "Add two numbers, e.g. Two floats."


def test_methods_nested_and_async_functions_in_any_block_are_found(library):
    handler = "try:\n    pass\nexcept OSError:\n" + textwrap.indent(function("Add in a handler.", "a"), "    ")
    inner = textwrap.indent(function("Add inside of another.", "b"), "    ")
    source = (
        handler + function("Add outside of another.", "c", inner + BODY) + "async " + function("Add it later.", "d")
    )
    assert len(answers(library({"a.py": source}))) == 4


@pytest.mark.parametrize(
    "docstring",
    [
        "Add numbers",  # no full stop
        "Add them.",  # two words
        "add two numbers.",
        "Add " + "very " * 30 + "many numbers.",
        "See the other function.",
        "Alias of the other function.",
        "This function is deprecated.",
        "Args: first and second number.",
        "Add numbers, as in >>> add(1, 2).",
        "",
    ],
)
def test_a_docstring_that_does_not_open_with_a_summary_is_left_out(library, docstring):
    assert not is_summary(first_sentence(docstring))
    assert answers(library({"a.py": function(docstring) + function("Add two numbers.", "good")})) == [
        "Add two numbers."
    ]


@pytest.mark.parametrize(
    "body",
    [
        "",
        "    pass  # " + "x" * 60,
        "    ...  # " + "x" * 60,
        "    raise NotImplementedError('" + "x" * 60 + "')",
        "    return 1",
        "    return '" + "x" * 1500 + "'",
    ],
)
def test_code_that_says_nothing_or_too_much_is_left_out(library, body):
    assert answers(library({"a.py": function("Add two numbers.", body=body)})) == []


def test_duplicates_tests_copies_and_files_that_are_not_python_are_left_out(library):
    name = library(
        {
            "a.py": function("The first summary wins."),
            "b.py": function("The second summary loses."),
            "sub/c.py": function("Another name is other code.", "other"),
            "tests/test_a.py": function("A test is no example.", "tested"),
            "_vendor/d.py": function("A copy of another library.", "vendored"),
            "template.py": "def {{ name }}(:\n",
        }
    )
    assert sorted(answers(name)) == ["Another name is other code.", "The first summary wins."]


def test_the_order_is_fixed_and_fair(library):
    """Not by file, and the same whatever other libraries are asked for."""
    one = library({"a.py": "".join(function("From the first library.", f"a{i}") for i in range(50))})
    two = library({"b.py": "".join(function("From the second library.", f"b{i}") for i in range(50))})
    both = docstring_pairs([one, two])
    assert both == docstring_pairs([two, one])
    assert [e for e in both if "first" in e.answer] == docstring_pairs([one])
    assert 10 <= sum("first" in example.answer for example in both[:50]) <= 40


def test_no_function_of_the_test_library_is_trained_on(library, monkeypatch):
    shared, own = function("Shared by both of them."), function("Only one has this.", "own")
    monkeypatch.setattr(docstrings, "TRAIN", (library({"a.py": shared + own}),))
    monkeypatch.setattr(docstrings, "TEST", (library({"b.py": function("The copy says otherwise.")}),))
    assert [example.answer for example in docstring_split("train")] == ["Only one has this."]
    assert [example.answer for example in docstring_split("test")] == ["The copy says otherwise."]


def test_a_docstring_with_half_of_a_surrogate_pair_is_no_text(library):
    files = {"a.py": function("Add two \\ud800 numbers."), "b.py": function("Add two numbers.", body=BODY + "\n")}
    assert r"\ud800" in files["a.py"]
    assert [example.answer for example in docstring_pairs([library(files)])] == ["Add two numbers."]


def test_a_library_that_is_not_installed_is_named():
    with pytest.raises(ValueError, match="no installed package is called 'not_there'"):
        docstring_pairs(["not_there"])


def test_the_collector_is_left_as_it_was(library):
    import gc

    gc.disable()
    docstring_pairs([library({"a.py": function("Add two numbers.")})])
    assert not gc.isenabled()
    gc.enable()
    docstring_pairs([library({"a.py": function("Add two numbers.")})])
    assert gc.isenabled()


@pytest.mark.long
def test_an_installed_library_gives_real_pairs():
    pairs = docstring_pairs(["numpy"])
    assert len(pairs) > 900  # 1,113 in numpy 2.4
    moveaxis = next(example for example in pairs if "def moveaxis(a, source, destination):" in example.prompt[0][1])
    assert moveaxis.answer == "Move axes of an array to new positions."


@pytest.mark.slow
def test_the_splits_of_the_default_data_share_no_function():
    train, test = docstring_split("train"), docstring_split("test")
    assert len(train) > 6000 and len(test) > 1500
    prompts = [example.prompt for example in train + test]
    assert len(set(prompts)) == len(prompts)
