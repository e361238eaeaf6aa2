"""Turn docstrings into pages: the public names, and one page for each room. Nothing of the library is imported.

In: the source of `qlora_lab`. Out: Markdown with MyST's directives for Python objects, as a text for each page.

Docstrings here are plain text: a paragraph is a paragraph, indented or aligned lines stand as they are, and backticks
mark code. All other signs of Markdown are escaped.

Not here: building the site (make_site.py).
"""

import ast
import inspect
import re
from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[1] / "qlora_lab"
INDENT = "    "
_SIGNS = re.compile(r"([\\*{}\[\]<>$|#~]|(?<!\w)_|_(?!\w))")
_TERM = re.compile(r"\n(?=[A-Za-z][\w, ]{0,30}: )")  # "Out: ...", "block_size: ..." begin a line of their own
_ALIGNED = re.compile(r"\S {3,}\S")


def rooms() -> list[str]:
    """Names of the rooms in the order of imports, as `qlora_lab/__init__.py` lists them."""
    return _value("_ROOMS")


def homes() -> dict[str, str]:
    """Public name -> the module it comes from."""
    return _value("_HOME")


def _value(name: str):
    for node in _tree(LIBRARY / "__init__.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise ValueError(f"qlora_lab/__init__.py assigns no {name}: tools/reference.py reads it there")


def public_page() -> str:
    """The reference of all public names, grouped by room."""
    parts = ["# Public names", "Every name on this page is reachable as `ql.NAME`, after `import qlora_lab as ql`."]
    for room in rooms():
        names = [name for name, home in homes().items() if home.split(".")[0] == room]
        if names:
            parts.append(f"## {room}")
        for name in names:
            module = LIBRARY.joinpath(*homes()[name].split(".")).with_suffix(".py")
            parts.append(_entry(_definition(_tree(module), name, module), f"qlora_lab.{name}"))
    return "\n\n".join(parts) + "\n"


def room_page(room: str) -> str:
    """The reference of one room: each file's docstring, then its functions and classes."""
    folder = LIBRARY / room
    parts = [f"# The room `{room}`", as_markdown(ast.get_docstring(_tree(folder / "__init__.py")) or "")]
    for path in sorted(folder.rglob("*.py")):
        if path == folder / "__init__.py":
            continue
        tree = _tree(path)
        name = path.relative_to(folder).as_posix()
        parts += [f"## {name}", as_markdown(ast.get_docstring(tree) or "")]
        dotted = ".".join(path.relative_to(LIBRARY.parent).with_suffix("").parts)
        definitions = [node for node in tree.body if _is_public(node)]
        parts += [_entry(node, f"{dotted}.{node.name}") for node in definitions]
    return "\n\n".join(parts) + "\n"


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def _is_public(node: ast.AST) -> bool:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return isinstance(node, kinds) and not node.name.startswith("_")


def _is_setter(node: ast.AST) -> bool:
    """A property's second half: one entry for both."""
    return any(ast.unparse(decorator).endswith(".setter") for decorator in node.decorator_list)


def _definition(tree: ast.Module, name: str, path: Path) -> ast.AST:
    nodes = {node.name: node for node in tree.body if hasattr(node, "name")}
    if name in nodes:
        node = nodes[name]
        # a class has its parent's fields and methods, too; a parent from another file has an entry of its own
        for parent in (nodes[base.id] for base in getattr(node, "bases", ()) if getattr(base, "id", "") in nodes):
            node.body += parent.body[1:]  # without its docstring
            node.decorator_list += parent.decorator_list
        return node
    raise ValueError(f"{path.name} defines no {name}, which qlora_lab/__init__.py promises")


def _entry(node: ast.AST, dotted: str) -> str:
    """One function or class with its signature and docstring, and with its public methods."""
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    body = [as_markdown(ast.get_docstring(node) or "")]
    if isinstance(node, ast.ClassDef):
        body += [_method(part, dotted) for part in node.body if _is_public(part) and not _is_setter(part)]
    text = "\n\n".join(body)
    return f"::::{{py:{kind}}} {dotted}{_signature(node)}\n\n{text}\n\n::::"


def _method(node: ast.FunctionDef, owner: str) -> str:
    is_property = any(ast.unparse(decorator).endswith("property") for decorator in node.decorator_list)
    kind, signature = ("attribute", "") if is_property else ("method", _signature(node))
    text = as_markdown(ast.get_docstring(node) or "")
    return f":::{{py:{kind}}} {owner}.{node.name}{signature}\n\n{text}\n\n:::"


def _signature(node: ast.AST) -> str:
    """Arguments as they are written; for a class, those of `__init__` or the fields of a dataclass."""
    if isinstance(node, ast.ClassDef):
        init = next((part for part in node.body if getattr(part, "name", None) == "__init__"), None)
        if init is None:
            fields = [ast.unparse(part) for part in node.body if isinstance(part, ast.AnnAssign)]
            return f"({', '.join(fields)})" if node.decorator_list else ""
        return f"({_arguments(init)})"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({_arguments(node)}){returns}"


def _arguments(node: ast.FunctionDef) -> str:
    text = ast.unparse(node.args)
    return re.sub(r"^(self|cls)(, |$)", "", text)


def as_markdown(docstring: str) -> str:
    """A plain-text docstring as Markdown: paragraphs, and everything indented, aligned or typed at a prompt as code."""
    blocks = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    return "\n\n".join(_block(block) for block in blocks)


def _block(block: str) -> str:
    lines = block.splitlines()
    if any(line.startswith((">>>", "    ")) for line in lines) or sum(map(bool, map(_ALIGNED.search, lines))) > 1:
        language = "pycon" if ">>>" in block else "text"
        return f"```{language}\n{block}\n```"
    return _TERM.sub(r"\\\n", escaped(block))


def escaped(text: str) -> str:
    """Signs of Markdown escaped, but within backticks."""
    spans = re.split(r"(`[^`]+`)", text)
    return "".join(span if span.startswith("`") else _SIGNS.sub(r"\\\1", span) for span in spans)
