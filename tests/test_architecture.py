"""The house keeps its shape: direction of imports, a light front door, documented names, one environment."""

import ast
import re
import subprocess
import sys
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import qlora_lab as ql
from tools.reference import public_page

ROOT = Path(__file__).parent.parent
ROOMS = [
    "files",
    "kernels",
    "quant",
    "data",
    "model",
    "adapters",
    "optim",
    "train",
    "infer",
    "export",
    "doctor",
    "measure",
    "memory",
    "gpu_code",
    "show",
    "exercises",
    "cli",
]
# each may import those before it; kernels import nothing else
HEAVY = ["torch", "triton", "numba", "matplotlib", "ipywidgets", "anywidget", "scipy", "transformers", "numpy"]


@cache
def tree_of(path: Path) -> ast.Module:
    """A file's syntax tree, which several tests walk and none changes."""
    return ast.parse(path.read_text("utf-8"))


def imports_of(path: Path) -> set[str]:
    """Dotted names of qlora_lab that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return {name for name in found if name.split(".")[0] == "qlora_lab"}


def test_imports_point_one_way():
    wrong = []
    for path in sorted((ROOT / "qlora_lab").rglob("*.py")):
        room = path.relative_to(ROOT / "qlora_lab").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        allowed = ["kernels"] if room == "kernels" else ROOMS[: ROOMS.index(room) + 1]
        for name in imports_of(path):
            part = name.split(".")[1] if "." in name else None
            if part not in allowed and (part is not None or room != "cli"):
                wrong.append(f"{path.name} imports {name}")
    assert wrong == []


def test_the_quant_room_needs_numbers_only():
    outside = set()
    for path in (ROOT / "qlora_lab" / "quant").glob("*.py"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Import):
                outside |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                outside.add(node.module.split(".")[0])
    assert outside - set(sys.stdlib_module_names) == {"torch", "scipy", "qlora_lab"}


def test_witnesses_are_never_imported_by_the_library():
    for path in (ROOT / "qlora_lab").rglob("*.py"):
        words = {w.split(".")[0] for node in ast.walk(tree_of(path)) for w in _modules(node)}
        assert not words & {"bitsandbytes", "peft", "torchao", "playwright"}, path


def _modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def test_importing_the_library_is_light():
    code = f"import sys, qlora_lab; print([m for m in {HEAVY} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@cache
def reference() -> str:
    return public_page()


@pytest.mark.parametrize("name", ql.__all__)
def test_public_names_exist_and_are_documented(name):
    assert getattr(ql, name).__doc__, f"{name} has no docstring"
    assert f"}} qlora_lab.{name}" in reference(), f"{name} is not in the reference of the documentation"


def test_an_unknown_name_lists_the_known():
    with pytest.raises(AttributeError, match="no 'quantise': its public names are .*quantize"):
        _ = ql.quantise


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_conda_environment_installs_this_project():
    import yaml

    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    assert f"python{project()['requires-python']}" in conda
    (pip,) = (d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert pip == ["-c constraints.txt", "-e .[test,docs]"] and '-c constraints.txt -e ".[test,docs]"' in makefile
    assert {"test", "docs", "parquet", "eval", "energy"} == set(project()["optional-dependencies"])


def test_constraints_pin_every_dependency_and_name_no_host():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    text = (ROOT / "constraints.txt").read_text("utf-8")
    assert "://" not in text and "@" not in text
    lines = map(Requirement, (line for line in text.splitlines() if not line.startswith("#")))
    pins = {canonicalize_name(pin.name): pin for pin in lines}
    wanted = project()["dependencies"] + sum(project()["optional-dependencies"].values(), [])
    for requirement in map(Requirement, wanted):
        pin = pins[canonicalize_name(requirement.name)]
        version = next(iter(pin.specifier)).version
        assert requirement.specifier.contains(version), f"{requirement} does not admit the tested {version}"


def test_what_is_imported_is_declared():
    extras = project()["optional-dependencies"]
    requirements = project()["dependencies"] + extras["parquet"] + extras["eval"] + extras["energy"]
    declared = {re.split(r"[^a-z0-9_-]", r.lower())[0].replace("-", "_") for r in requirements}
    names = {"PIL": "pillow", "pynvml": "nvidia_ml_py", "IPython": "ipython"}
    for path in (ROOT / "qlora_lab").rglob("*.py"):
        modules = {m.split(".")[0] for node in ast.walk(tree_of(path)) for m in _modules(node)}
        outside = {names.get(m, m) for m in modules} - set(sys.stdlib_module_names) - {"qlora_lab", ""}
        assert outside <= declared, f"{path.name} imports {outside - declared}, which pyproject.toml does not declare"


def test_version_is_said_once_more():
    assert ql.__version__ == project()["version"]
    assert f"## {ql.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


# ----------------------------------------------------------------------------------------------- the size of the house

LIBRARY = sorted((ROOT / "qlora_lab").rglob("*.py"))
# what explains QLoRA from end to end, in this order
PATH = ["quant/codebook", "quant/blocks", "quant/packing", "quant/double_quant", "quant/quantize", "model/linear4bit"]
PATH += ["adapters/lora", "train/loss", "optim/paging", "train/loop"]


def lines_of(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines()


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_no_room_is_a_seventh_of_the_library():
    """A room above 15 % is a sign to split it."""
    sizes = Counter()
    for path in LIBRARY:
        sizes[path.relative_to(ROOT / "qlora_lab").parts[0]] += len(lines_of(path))
    assert {room for room, size in sizes.items() if size > 0.15 * sizes.total()} == set()


def test_files_and_functions_stay_small():
    """A file above 400 lines says in its docstring why it is one."""
    long = [path for path in LIBRARY if len(lines_of(path)) > 400]
    assert [path.name for path in long if "One file:" not in ast.get_docstring(tree_of(path))] == []
    of_60_lines = [
        f"{path.name}: {node.name}"
        for path in LIBRARY
        for node in functions(path)
        if node.end_lineno - node.lineno >= 60
    ]
    assert of_60_lines == []


def test_few_functions_have_more_than_six_parameters():
    """13 had outside the kernels, whose arguments are pointers and sizes."""
    many = []
    for path in LIBRARY:
        for node in functions(path):
            names = [name.arg for name in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            if len(set(names) - {"self", "cls"}) > 6 and "kernels" not in path.parts:
                many.append(f"{path.parent.name}.{path.stem}.{node.name}")
    assert len(many) <= 6, many


def test_one_line_in_twelve_has_a_comment():
    comments = total = 0
    for path in LIBRARY:
        total += len(lines_of(path))
        with path.open("rb") as file:
            tokens = [t for t in tokenize.tokenize(file.readline) if t.type == tokenize.COMMENT]
        comments += len({token.start[0] for token in tokens if "noqa" not in token.string})
    assert comments >= 0.08 * total


# Without dtype= these take what torch.set_default_dtype has set, perhaps by another library. Of whole numbers some make
# int64, but this test cannot see which are whole.
CONSTRUCTORS = {"empty", "zeros", "ones", "full", "tensor", "as_tensor", "linspace", "logspace", "eye"}
CONSTRUCTORS |= {"rand", "randn", "normal", "scalar_tensor", "Tensor", "empty_strided"}


def constructors_without_dtype(tree: ast.Module) -> Iterator[ast.Call]:
    """Yield calls such as torch.zeros(3); also torch.arange with a float written out, and new linear layers."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name = ast.unparse(node.func)
        floats = any(isinstance(a, ast.Constant) and isinstance(a.value, float) for a in node.args)
        makes = name in {"nn.Linear", "nn.Embedding"} or name == "torch.arange" and floats
        if (makes or name in {f"torch.{c}" for c in CONSTRUCTORS}) and "dtype" not in {k.arg for k in node.keywords}:
            yield node


def test_no_tensor_has_the_default_dtype_of_torch():
    wrong = [
        f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}: say dtype="
        for path in LIBRARY
        for call in constructors_without_dtype(tree_of(path))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("torch.zeros(3, device=cpu)", 1),
        ("torch.tensor(torch.ones(1))", 2),
        ("torch.arange(6.0)", 1),
        ("nn.Linear(3, 2)", 1),
        ("torch.arange(6) + torch.zeros(3, dtype=torch.float32)", 0),
        ("torch.zeros_like(x)", 0),
    ],
)
def test_a_constructor_without_dtype_is_found(line, found):
    assert len(list(constructors_without_dtype(ast.parse(line)))) == found


# Each method has the file of its name; prefixes and prompts share one more.
METHOD_FILES = ["full", "lora", "houlsby", "prefix_tuning", "prompt_tuning", "virtual_tokens", "bitfit"]
METHOD_FILES += ["rslora", "dora", "pissa", "loftq"]


def lines_of_code(path: Path) -> int:
    """Lines that hold more than comments and docstrings."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    documented = [
        node.body[0] for node in ast.walk(tree_of(path)) if isinstance(node, kinds) and ast.get_docstring(node)
    ]
    said = {line for text in documented for line in range(text.lineno, text.end_lineno + 1)}
    blank = (tokenize.ENCODING, tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    with path.open("rb") as file:
        tokens = [t for t in tokenize.tokenize(file.readline) if t.type not in (*blank, tokenize.ENDMARKER)]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - said)


def test_all_methods_together_are_short():
    files = [*(f"adapters/{name}" for name in METHOD_FILES), "train/lora_plus"]
    lengths = {name: lines_of_code(ROOT / "qlora_lab" / f"{name}.py") for name in files}
    assert sum(lengths.values()) <= 600, lengths


def test_a_reader_s_path_is_an_evening_long():
    lengths = {name: len(lines_of(ROOT / "qlora_lab" / f"{name}.py")) for name in PATH}
    print(
        *(f"{name}.py  {length} lines" for name, length in lengths.items()), f"{sum(lengths.values())} lines", sep="\n"
    )
    assert sum(lengths.values()) <= 1500
