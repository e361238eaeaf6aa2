"""Names and texts that are not ours, in what we draw and write: they stand there letter by letter, whatever they hold.

In: the name of a layer or a model, a token, a function's source. Out: text for matplotlib, for HTML, or for Markdown.
Source: matplotlib's mathtext, which is what stands between two dollar signs; JupyterLab's MathJax, which looks for them
in HTML outputs too, text by text; CommonMark section 4.5, whose fence ends at a line of as many backticks.

Not here: the attributes of HTML, where html.escape is enough.
"""

import html
import re


def for_picture(text: str) -> str:
    """`text` for matplotlib, which takes `$...$` for a formula, and raises where it is none.

    >>> print(for_picture("a$b_c$"))
    a\\$b_c\\$
    """
    return text.replace("$", r"\$")


def for_html(text: str) -> str:
    """`text` as the content of an element; a dollar sign has one of its own, where MathJax finds no partner for it.

    >>> for_html("<b>$x$</b>")
    '&lt;b&gt;<span>$</span>x<span>$</span>&lt;/b&gt;'
    """
    return html.escape(text).replace("$", "<span>$</span>")


def fenced(code: str, language: str = "") -> str:
    """`code` as a block of Markdown, its fence longer than any that the code holds.

    >>> fenced("1 + 2", "python").splitlines()
    ['```python', '1 + 2', '```']
    """
    fence = _longer_than_any(code, 3)
    return f"{fence}{language}\n{code}\n{fence}"


def code_span(text: str) -> str:
    """`text` as code within a line of Markdown.

    >>> print(code_span("a"), code_span("`x`"))
    `a` `` `x` ``
    """
    fence = _longer_than_any(text, 1)
    room = " " * (text.startswith("`") or text.endswith("`"))
    return f"{fence}{room}{text}{room}{fence}"


def _longer_than_any(text: str, least: int) -> str:
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)
