"""Show foreign names and texts letter by letter in pictures, HTML and Markdown, whatever characters they hold.

Source: matplotlib's mathtext stands between two dollar signs; JupyterLab's MathJax looks for them in HTML outputs too,
text by text; a fence of CommonMark (section 4.5) ends at a line of as many backticks.
"""

import html
import re
from unicodedata import category


def for_picture(text: str) -> str:
    """Escape `text` for matplotlib, which takes `$...$` for a formula and raises if it is not one.

    >>> print(for_picture("a$b_c$"))
    a\\$b_c\\$
    """
    return text.replace("$", r"\$")


def for_html(text: str) -> str:
    """Escape `text` as the content of an element. Each dollar sign gets its own element, so MathJax finds no pair."""
    return html.escape(text).replace("$", "<span>$</span>")


def spelled(text: str) -> str:
    """Spell out control characters, and halves of surrogate pairs that no file can hold; lines and tabs stay.

    A terminal obeys them: an answer could move its cursor, or change its title.

    >>> print(spelled("\x1b[2J gone"))
    \\x1b[2J gone
    """
    return "".join(ascii(c)[1:-1] if category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text)


def fenced(code: str, language: str = "") -> str:
    """Make `code` a block of Markdown, with a fence longer than any in the code."""
    fence = _longer_than_any(code, 3)
    return f"{fence}{language}\n{code}\n{fence}"


def code_span(text: str) -> str:
    """Make `text` code within a line of Markdown.

    >>> print(code_span("a"), code_span("`x`"))
    `a` `` `x` ``
    """
    fence = _longer_than_any(text, 1)
    room = " " * (text.startswith("`") or text.endswith("`"))  # CommonMark strips it again
    return f"{fence}{room}{text}{room}{fence}"


def _longer_than_any(text: str, least: int) -> str:
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)
