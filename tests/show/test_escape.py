"""Names that mean something to matplotlib, to HTML, to MathJax or to Markdown are shown letter by letter."""

import re

import numpy as np
import pytest
from markdown_it import MarkdownIt
from matplotlib.text import Text

from qlora_lab.measure.best_plan import Candidate, Choices
from qlora_lab.show.block_size import BlockSizeExplorer
from qlora_lab.show.escape import code_span, fenced, for_html, for_picture
from qlora_lab.show.figure import new_figure, picture
from qlora_lab.show.labels import LabelView
from qlora_lab.show.source import Source

NAMES = ["a$b_c", "$x^2$", r"$\frac$", r"a\$b", "$", "$$", "a_b^c", "<b>x</b>", "<script>", "`x`", "```", "& &amp;"]


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_a_picture_is_itself(name):
    fig, ax = new_figure()
    ax.set_title(for_picture(name))
    ax.set_xticks([0, 1], [for_picture(name), for_picture(f"{name} {name}")])
    ax.plot([0, 1], [0, 1], label=for_picture(name))
    ax.legend()
    picture(fig, "drawn")  # matplotlib raises for what looks like a formula and is none
    drawn = [text for text in fig.findobj(Text) if name in text.get_text().replace(r"\$", "$")]
    assert len(drawn) >= 4
    for text in drawn:
        shown, is_formula = text._preprocess_math(text.get_text())
        assert not is_formula and shown in (name, f"{name} {name}")


def test_without_it_a_name_is_a_formula():
    fig, ax = new_figure()
    ax.set_title(r"$\frac$")
    with pytest.raises(ValueError, match="frac"):
        picture(fig, "not drawn")


@pytest.mark.long
@pytest.mark.parametrize("name", [*NAMES[:3], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[3:])])
def test_a_layer_of_any_name_has_its_place_on_the_map(name):
    layers = (f"model.layers.0.{name}", f"model.layers.1.{name}")
    candidates = Candidate("nf4", 64, False), Candidate("nf4", 128, False)
    bits = np.array([[4.5 * 1024, 4.25 * 1024]] * 2)
    choices = Choices(layers, (1024, 1024), candidates, np.array([[1.0, 2.0], [1.0, 4.0]]), bits)
    explorer = BlockSizeExplorer(choices)
    (shown,) = (text._preprocess_math(text.get_text()) for text in explorer.image.axes.get_yticklabels())
    assert shown == (name.removesuffix("_proj"), False)
    assert "<script>" not in explorer._pane.below


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_html_is_itself_and_no_formula(name):
    page = for_html(name)
    assert not re.search(r"\$[^<]*\$", page)  # MathJax looks for a pair in each text of its own
    texts = re.sub(r"<span>\$</span>", "$", page)
    assert "<" not in texts and texts.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") == name


def test_tokens_with_tags_or_dollars_are_shown_as_they_are():
    page = LabelView([("<script>alert(1)</script>", True), ("$5 and $6", False)])._repr_mimebundle_()["text/html"]
    assert "<script" not in page and "&lt;script&gt;" in page and not re.search(r"\$[^<]*\$", page)


@pytest.mark.parametrize("name", NAMES)
def test_markdown_holds_code_as_it_is(name):
    (block,) = MarkdownIt().parse(fenced(name, "python"))
    assert (block.type, block.content, block.info) == ("fence", f"{name}\n", "python")
    _, line, _ = MarkdownIt().parse(f"before {code_span(name)} after")
    assert [part.content for part in line.children] == ["before ", name, " after"]


def test_source_with_a_fence_in_it_is_one_block():
    source = Source('def f():\n    """\n    ```\n    <b>x</b>\n    ```\n    """')
    (block,) = MarkdownIt().parse(source._repr_mimebundle_()["text/markdown"])
    assert block.type == "fence" and block.content == f"{source}\n"
