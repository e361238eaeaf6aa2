"""Find the cells of a notebook that later cells need, so that grading runs seconds of it and not minutes.

In: the sources of code cells, in order, and which of them run in any case. Out: the indices of all that have to run.
A cell is needed if it binds a name that a later one reads, or changes in place what the name stands for.

But: it reads the text alone. A change is seen where a statement makes it: `x.y = 1`, `x[0] = 1`, `x.append(1)`, `f(x)`.
One that a function makes while it returns something else, as in `y = f(x)`, is not seen, nor is the text of a magic.
"""

import ast
import builtins
import symtable
import warnings
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import NamedTuple

SHOWING = ("print", "display")  # nothing that they are given changes
RANDOM = "<random numbers>"  # no name in Python: a seed changes what every later draw gives
BUILTINS = vars(builtins).keys()


class Names(NamedTuple):
    """What a cell does with global names. inner: function -> the names that it reads, which is when it is called."""

    read: set[str]  # as earlier cells left them
    bound: set[str]
    sure: set[str]  # bound whatever happens, not in an `if` or a loop
    changed: set[str]
    imported: set[str]
    inner: dict[str, set[str]]


@lru_cache(maxsize=1024)  # a cell is looked at from several sides
def parsed(source: str) -> ast.Module | None:
    """Return the syntax tree of a cell, its magics (%time, !ls) made into calls; None where it is not Python."""
    from IPython.core.inputtransformer2 import TransformerManager  # half a second to import

    try:
        with warnings.catch_warnings(action="ignore"):  # of a student's "\d", say: the kernel warns as well
            tree = ast.parse(TransformerManager().transform_cell(source))
            symtable.symtable(ast.unparse(tree), "cell", "exec")  # refuses what parses and is no program: `return 3`
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: a zero byte
        return None
    return tree


def needed(sources: Sequence[str], always: Collection[int]) -> list[int]:
    """Return the indices of the cells to run, in order: those in `always`, and whatever they need.

    A cell that is not Python runs only if it is in `always`.

    >>> needed(["a = 1", "b = 2", "a += 1", "print(b)", "print(a)"], {4})
    [0, 2, 4]
    """
    cells = [_names_of(source) for source in sources]
    known = [cell for cell in cells if cell]
    modules = set().union(*(cell.imported for cell in known))
    inner = {}
    for cell in known:
        for name, read in cell.inner.items():
            inner.setdefault(name, set()).update(read)  # a function may be defined twice; either may be meant
    wanted = {RANDOM}
    chosen = []
    for index in reversed(range(len(cells))):
        cell = cells[index]
        if index in always or (cell and wanted & (cell.bound | (cell.changed - modules))):
            chosen.append(index)
            if cell:
                # what is bound here for sure comes from no earlier cell; what a wanted function reads is wanted, too
                wanted = (wanted - (cell.sure - cell.read)) | _with_inner(cell.read, inner)
    return chosen[::-1]


def _with_inner(names: set[str], inner: dict[str, set[str]]) -> set[str]:
    """Add what the functions among `names` read, and what those that they call read."""
    found = set()
    open_ = set(names)
    while open_:
        found |= open_
        open_ = set().union(*(inner.get(name, ()) for name in open_)) - found
    return found


@lru_cache(maxsize=1024)
def _names_of(source: str) -> Names | None:
    """Collect the names of a cell, or None if it is not Python."""
    tree = parsed(source)
    if tree is None:
        return None
    names = Names(set(), set(), set(), set(), set(), {})
    for statement in tree.body:
        _add_statement(statement, names)
    for node in ast.walk(tree):
        _add_node(node, names)
    names.changed.difference_update(BUILTINS)
    return names


def _add_statement(statement: ast.stmt, names: Names) -> None:
    """Add what a statement at the top of a cell reads and binds. What the cell has bound before comes from no other."""
    table = symtable.symtable(ast.unparse(statement), "cell", "exec")  # unparse: magics are calls by now
    symbols = table.get_symbols()
    read = {symbol.get_name() for symbol in symbols if symbol.is_referenced()} | _globals_in(table)
    names.read.update(read - BUILTINS - names.sure)
    names.bound.update(symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported())
    names.sure.update(_bound_for_sure(statement))
    for child in table.get_children():
        names.inner.setdefault(child.get_name(), set()).update(_globals_in(child) - BUILTINS)


def _globals_in(table: symtable.SymbolTable) -> set[str]:
    """Name the globals that a scope reads, with the functions and comprehensions inside it."""
    found = set()
    if table.get_type() != "module":
        found = {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()}
    return found.union(*map(_globals_in, table.get_children()))


def _bound_for_sure(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Assign):
        inside = [inner for target in node.targets for inner in ast.walk(target)]
        return {inner.id for inner in inside if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)}
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    return _imported_by(node)


def _imported_by(node: ast.AST) -> set[str]:
    if not isinstance(node, (ast.Import, ast.ImportFrom)):
        return set()
    return {alias.asname or alias.name.partition(".")[0] for alias in node.names}


def _add_node(node: ast.AST, names: Names) -> None:
    """Add what one node imports, changes, or gives a name that can be called."""
    names.imported.update(_imported_by(node))
    if isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
        names.changed.update(_root(node))
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        called = ast.unparse(node.value.func)
        if called in SHOWING or called.startswith("get_ipython()"):
            return
        given = [*node.value.args, *(keyword.value for keyword in node.value.keywords)]
        names.changed.update(_root(node.value.func), *map(_root, given))
        if "seed" in called:  # torch.manual_seed, np.random.seed, random.seed
            names.changed.add(RANDOM)
    elif isinstance(node, ast.Assign) and any(isinstance(inner, ast.Lambda) for inner in ast.walk(node.value)):
        read = {inner.id for inner in ast.walk(node.value) if isinstance(inner, ast.Name)} - BUILTINS
        for target in node.targets:
            for name in _root(target):
                names.inner.setdefault(name, set()).update(read)


def _root(node: ast.AST) -> set[str]:
    """The name at the left end of `a.b[0].c(...)`, if there is one."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return {node.id} if isinstance(node, ast.Name) else set()
