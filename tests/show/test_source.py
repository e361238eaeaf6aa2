"""A function's source in the notebook and in the explorer."""

import pytest
from toy import RoundingExplorer, step_width

from qlora_lab.show import figure
from qlora_lab.show.figure import img
from qlora_lab.show.source import called_functions, details_html, show_source, source_html
from qlora_lab.show.tournament import TournamentExplorer


def uses_the_library(png):
    words = sorted([str(png)])
    return img(png, words[0]), figure.picture(None, "x"), img(png, "again")


def test_show_source_is_the_source():
    source = show_source(step_width)
    assert repr(source) == "# toy.py\ndef step_width(bits):\n    return 6.0 / 2**bits"
    bundle = source._repr_mimebundle_()
    assert bundle == {"text/markdown": f"```python\n{source}\n```", "text/plain": repr(source)}


def test_several_functions_and_their_files():
    text = repr(show_source(img, RoundingExplorer.compute))
    assert text.startswith("# qlora_lab/show/figure.py\ndef img(png, alt):")
    assert "\n\n\n# toy.py\n@staticmethod\ndef compute(state):" in text


def test_a_builtin_has_no_source():
    with pytest.raises(TypeError, match="<built-in function len> has no Python source to show"):
        show_source(len)


def test_called_functions_are_the_librarys_own_each_once():
    assert called_functions(uses_the_library) == [figure.img, figure.picture]
    assert called_functions(RoundingExplorer.compute) == []


def test_what_a_cached_function_calls_counts_too():
    names = [function.__name__ for function in called_functions(TournamentExplorer.compute)]
    assert names == ["played", "simulate", "bradley_terry", "elo_of_one_order", "scores"]


def test_html_is_coloured_and_escaped():
    page = details_html("Show <source>", source_html(step_width))
    assert page.startswith('<details><summary data-lm-suppress-shortcuts="true"')
    assert "Show &lt;source&gt;</summary>" in page
    assert "color: " in page and "step_width" in page
