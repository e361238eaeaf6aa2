"""Show a function's source where the reader stands, so that the notebook stays thin and the code stays visible.

`show_source` is Markdown, not HTML: Lab and code hosts highlight it in the reader's own theme, and a stored notebook
holds the source alone, so a new release of pygments changes no notebook.
"""

import ast
import html
import inspect
import textwrap
from types import FunctionType

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from qlora_lab.show.escape import fenced

_LIBRARY = __name__.split(".")[0]  # qlora_lab


class Source:
    """Source text with its headline, shown as Markdown."""

    def __init__(self, text):
        self.text = text

    def __repr__(self):
        return self.text

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"text/markdown": fenced(self.text, "python"), "text/plain": self.text}


def show_source(*functions):
    """Show the source of each function, under the name of its file.

    Raises TypeError for a function without Python source (a builtin, a C function), and names it.
    """
    return Source("\n\n\n".join(_source(f) for f in functions))


def source_html(*functions):
    """Return the same as HTML with inline styles on a white panel, legible in both of Lab's themes."""
    code = "\n\n\n".join(_source(f) for f in functions)
    style = "padding:8px;overflow-x:auto;background:#fff;color:#111"  # pygments' colours are for white
    return highlight(code, PythonLexer(), HtmlFormatter(noclasses=True, nobackground=True, prestyles=style))


def called_functions(function):
    """List the functions of this library that `function` calls by name, in order of appearance, each once.

    A function that is called through a cache was taken out of `function` for that alone: what it calls counts, too.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    names = [n.func for n in ast.walk(tree) if isinstance(n, ast.Call)]
    names.sort(key=lambda n: (n.lineno, n.col_offset))  # ast.walk goes level by level
    called = []
    for f in (_resolve(n, function.__globals__) for n in names):
        called += [f.__wrapped__, *called_functions(f.__wrapped__)] if hasattr(f, "cache_info") else [f]
    called = [f for f in called if isinstance(f, FunctionType) and f is not function]
    return [f for f in dict.fromkeys(called) if f.__module__.split(".")[0] == _LIBRARY]


def _resolve(node, names):
    """Return the object that `a` or `a.b.c` names, or None."""
    if isinstance(node, ast.Attribute):
        return getattr(_resolve(node.value, names), node.attr, None)
    return names.get(node.id) if isinstance(node, ast.Name) else None


def _source(function):
    try:
        text = inspect.getsource(function)
    except (TypeError, OSError) as err:
        raise TypeError(f"{function!r} has no Python source to show: pass a function written in Python.") from err
    return f"# {function.__module__.replace('.', '/')}.py\n" + textwrap.dedent(text).rstrip()


def details_html(summary, body):
    """Make a native disclosure: keyboard and screen reader know it, and Lab's shortcuts are off on its handle."""
    handle = f'<summary data-lm-suppress-shortcuts="true" style="cursor:pointer">{html.escape(summary)}</summary>'
    return f"<details>{handle}{body}</details>"
