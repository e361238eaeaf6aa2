"""The label view: what is marked is what is learned, and text cannot break the page."""

from qlora_lab.show.labels import STYLE, LabelView

RECORDS = [("<|im_start|>", False), ("a < b\n", False), ("yes", True)]


def test_learned_tokens_are_marked():
    page = LabelView(RECORDS)._repr_mimebundle_()["text/html"]
    assert page.count(STYLE) == 1 and f'{STYLE}">yes</span>' in page


def test_text_is_escaped_and_line_breaks_show():
    page = LabelView(RECORDS)._repr_mimebundle_()["text/html"]
    assert "&lt;|im_start|&gt;" in page and "a &lt; b⏎\n" in page
    assert repr(LabelView(RECORDS)) == "<|im_start|>a < b\n[yes]"
