"""Compile the Triton kernels for GPUs that are not here, and read the machine code.

Triton brings NVIDIA's assembler and disassembler, and needs no GPU for them. Kernels are compiled in a child process,
because a process with TRITON_INTERPRET=1 cannot compile, and results are kept for the life of this one.

"Instructions for each weight" are those that one thread executes in a full tile, over the weights it handles there; for
a kernel with a loop, those of one pass. machine_code.py says which way is counted where code branches.
Measured times are not here: roofline() is arithmetic on data sheets.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from math import ceil, prod
from pathlib import Path

from qlora_lab.gpu_code import machine_code
from qlora_lab.gpu_code.cards import CARDS, LIMITS, Roof, occupancy, roof
from qlora_lab.gpu_code.rungs import DTYPES, HALVES, RUNGS

ARCHS = tuple(LIMITS)


@dataclass(frozen=True)
class Report:
    """What the machine code of one kernel says. Counts in `mix` and `moved` are for each weight."""

    rung: str
    kernel: str
    arch: int
    dtype: str
    warps: int
    registers: int  # of a thread
    shared: int  # bytes of a block
    local: int  # bytes of a thread's stack and local memory
    spills: int  # LDL and STL
    occupancy: float
    instructions: int  # of the whole text, once each
    weights: float  # that a thread handles in the counted part
    loop: bool  # one pass of the main loop is counted, else the whole program
    mix: dict[str, float]  # kind of instruction -> how many
    per_weight: float  # all kinds
    accesses: dict[str, int]  # opcode -> how many in the whole text
    moved: float  # bytes of global memory that instructions ask for; caches serve some of it
    least: float  # bytes that must be moved
    tokens: int | None  # of a tile, for a product


@dataclass(frozen=True)
class Code:
    """One compiled kernel as text, with its resources as the assembler gave them."""

    kernel: str  # mangled name
    sass: str
    ptx: str
    warps: int
    registers: int
    shared: int
    local: int
    tile: int  # weights
    tokens: int | None = None  # of a tile


def report(
    rungs: Iterable[str] | None = None, archs: Iterable[int] = ARCHS, dtype: str = "bfloat16", progress: bool = False
) -> list[Report]:
    """Report on each rung (None: all that take the dtype) for each architecture: 80, 90, 100.

    dtype: of weights and activations; kernels on constants take float32 alone, and are reported for any dtype. The
    first call compiles, about a second per kernel; Triton keeps the result on disk. Raises ValueError for an unknown
    rung, architecture or dtype, and if Triton is missing.
    """
    archs = list(archs)
    for arch in archs:
        _check_target(arch, dtype)
    names = [name for name in RUNGS if _dtype(name, dtype) in RUNGS[name].dtypes] if rungs is None else list(rungs)
    wanted = [(name, arch, _dtype(name, dtype)) for name in names for arch in archs]
    return [_read(*key, code, RUNGS[key[0]].loop) for key, code in zip(wanted, _compile(wanted, progress), strict=True)]


def sass(rung: str, arch: int = 90, dtype: str = "bfloat16") -> str:
    """Return the machine code of a rung, as nvdisasm prints it. Raises ValueError as report() does."""
    return _compile([(rung, arch, _dtype(rung, dtype))])[0].sass


def ptx(rung: str, arch: int = 90, dtype: str = "bfloat16") -> str:
    """Return the PTX of a rung, from which the assembler made its machine code. Raises ValueError as report() does."""
    return _compile([(rung, arch, _dtype(rung, dtype))])[0].ptx


def check_product(shape: Sequence[int], tokens: int) -> None:
    """Raise ValueError for a side or a number of tokens below 1, or above 2^31 - 1."""
    if min(*shape, tokens) < 1 or max(*shape, tokens) >= 2**31:
        raise ValueError(
            f"shape={tuple(shape)} and tokens={tokens} are not allowed: each must be from 1 to 2,147,483,647"
        )


def roofline(report: Report, shape: tuple[int, int] = (4096, 4096), tokens: int = 256) -> list[Roof]:
    """Return the least time on each card of the report's architecture, for a weight of this shape: a model.

    A gemv handles the tokens it was compiled for; `tokens` is for the tensor cores' products. Memory moves every weight
    once, x and y once. Instructions are per_weight for each weight and each tile of tokens. Raises as check_product.
    """
    check_product(shape, tokens)
    weights = prod(shape) * RUNGS[report.rung].share
    size = DTYPES[report.dtype][1]  # bytes of a number
    tensor_cores = report.mix["tensor core"] > 0
    if report.tokens and not tensor_cores:
        tokens = report.tokens
    moved = weights * report.least + (tokens * sum(shape) * size if report.tokens else 0)
    tiles = ceil(tokens / report.tokens) if report.tokens else 1
    operations = 2 * tokens * weights if tensor_cores else 0
    instructions = report.per_weight * weights * tiles
    return [roof(card, moved, operations, report.dtype, instructions) for card in CARDS if card.arch == report.arch]


def _dtype(name: str, dtype: str) -> str:
    """Return `dtype`, or the only one that the rung takes."""
    dtypes = RUNGS[name].dtypes if name in RUNGS else ()
    return dtypes[0] if len(dtypes) == 1 and dtype in DTYPES else dtype


def _read(rung: str, arch: int, dtype: str, code: Code, loop: bool) -> Report:
    program = machine_code.parse(code.sass)
    counted = machine_code.main_loop(program) if loop else machine_code.way(program)
    weights = code.tile / (32 * code.warps)  # of a thread
    fixed, each = RUNGS[rung].least
    return Report(
        rung, code.kernel, arch, dtype, code.warps, code.registers, code.shared, code.local,
        machine_code.mix(program)["local memory"],
        occupancy(arch, code.registers, code.shared, code.warps), len(program), weights, loop,
        {kind: count / weights for kind, count in machine_code.mix(counted).items()}, len(counted) / weights,
        machine_code.accesses(program), sum(i.access for i in counted) / weights, fixed + each * DTYPES[dtype][1],
        code.tokens,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- compiling

_compiled: dict[tuple[str, int, str], Code] = {}


def _compile(wanted: list[tuple[str, int, str]], progress: bool = False) -> list[Code]:
    """(rung, arch, dtype) -> Code; those that are new are compiled in one child process."""
    for name, arch, dtype in wanted:
        _check(name, arch, dtype)
    missing = [key for key in dict.fromkeys(wanted) if key not in _compiled]
    if missing:
        _tool("nvdisasm")
        with tempfile.TemporaryDirectory() as folder:
            for key, made in zip(missing, _child(missing, folder, progress), strict=True):
                cubin = Path(folder, made.pop("cubin"))
                (kernel, text), = machine_code.sections(_run("nvdisasm", "-c", cubin)).items()  # fmt: skip
                used = _resources(cubin)[kernel]
                used["shared"] += made.pop("dynamic")
                _compiled[key] = Code(kernel, text, **used, **made)
    return [_compiled[key] for key in wanted]


def _check(name: str, arch: int, dtype: str) -> None:
    if name not in RUNGS:
        raise ValueError(f"rung {name!r:.60} is not known: choose from {', '.join(RUNGS)}")
    _check_target(arch, dtype)
    if dtype not in RUNGS[name].dtypes:
        raise ValueError(f"{name} does not take {dtype}: it takes {', '.join(RUNGS[name].dtypes)}")


def _check_target(arch: int, dtype: str = "float32") -> None:
    if arch not in ARCHS:
        raise ValueError(f"arch={arch} is not known: compute capability times ten, {', '.join(map(str, ARCHS))}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r:.60} is not known: choose from {', '.join(DTYPES)}")


def _child(keys: list, folder: str, progress: bool) -> Iterable[dict]:
    """Yield what _main() prints while it compiles, one dictionary for each key."""
    from tqdm.auto import tqdm

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", __spec__.name, folder, json.dumps(keys)]
    with open(Path(folder, "errors"), "w+", encoding="utf-8") as errors:
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        with child, tqdm(keys, "compiling", unit="kernel", leave=False, delay=2, disable=not progress) as bar:
            for key in bar:
                line = child.stdout.readline()
                if not line:
                    child.wait()
                    errors.seek(0)
                    reason = (errors.read().strip().splitlines() or ["no reason given"])[-1]
                    raise RuntimeError("{} does not compile for sm_{} in {}: ".format(*key) + reason)
                yield json.loads(line)


def _main(folder: str, keys: str) -> None:
    """In the child: compile each key, leave its cubin in `folder`, print one line of JSON."""
    from importlib import import_module

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for number, (name, arch, dtype) in enumerate(json.loads(keys)):
        rung = RUNGS[name]
        module = import_module(f"qlora_lab.kernels.triton.{rung.module or name}")
        kernel = getattr(module, f"_{name}_kernel")
        launch = rung.launch(module)
        constants = {argument: launch.pop(argument) for argument in kernel.arg_names if argument in launch}
        types = dict(part.split(":") for part in rung.signature.replace("*T", f"*{DTYPES[dtype][0]}").split())
        if set(kernel.arg_names) != {*types, *constants}:
            raise ValueError(f"its entry in RUNGS does not match its arguments, {', '.join(kernel.arg_names)}")
        signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
        whole = [i for i, kind in enumerate(signature.values()) if kind[0] in "*i"]  # multiples of 16
        source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in whole})
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch)
        cubin = Path(folder, f"{number}.cubin")
        cubin.write_bytes(made.asm["cubin"])
        facts = {
            "cubin": cubin.name,
            "ptx": made.asm["ptx"],
            "warps": made.metadata.num_warps,
            "dynamic": made.metadata.shared,
            "tile": prod(constants.get(part, part) for part in rung.tile),
            "tokens": constants.get(rung.tokens, rung.tokens),
        }
        print(json.dumps(facts), flush=True)


# -------------------------------------------------------------------------------------------------------- disassembling


def _tool(name: str) -> Path:
    package = find_spec("triton")
    if package is None:
        raise ValueError("Triton, which compiles the kernels, is not installed: on Linux, run pip install triton")
    path = Path(package.submodule_search_locations[0], "backends", "nvidia", "bin", name)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: this build of Triton lacks NVIDIA's tools; pip install triton")
    return path


def _run(tool: str, *arguments: str | Path) -> str:
    silent = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    return subprocess.run([_tool(tool), *arguments], check=True, **silent).stdout


def _resources(cubin: Path) -> dict[str, dict[str, int]]:
    """Kernel -> registers of a thread, static shared memory of a block, stack and local memory of a thread."""
    usage = _run("cuobjdump", "-res-usage", cubin)
    resources = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    return {
        name: {"registers": int(registers), "shared": int(shared), "local": int(stack) + int(local)}
        for name, registers, stack, shared, local in resources
    }


# -------------------------------------------------------------------------------------------------------- bitsandbytes

MANGLED = {"float32": "f", "bfloat16": "13__nv_bfloat16", "float16": "6__half"}
SPELLED = {"float32": "float", "bfloat16": "__nv_bfloat16", "float16": "__half"}


@dataclass(frozen=True)
class Theirs:
    """A kernel of bitsandbytes, as csrc/ops.cu and csrc/gemm_4bit_simt.cu launch it for NF4 and block size 64."""

    rung: str  # ours with the same work
    name: str
    arguments: tuple[int, ...]  # of the template, behind the dtype
    warps: int  # of a block
    weights: int  # of a thread, in a program or in one pass of its loop
    loop: bool = False
    tokens: int | None = None
    dtypes: tuple[str, ...] = tuple(DTYPES)


THEIRS = (
    Theirs("quantize_nf4", "kQuantizeBlockwiseSmall", (64, 2), 1, 2),
    Theirs("dequantize_nf4", "kDequantizeBlockwise", (512, 64, 8, 2), 2, 16),  # its loop runs once
    Theirs("dequantize_double", "kDequantizeBlockwise", (512, 64, 8, 2), 2, 16),  # and another launch for constants
    Theirs("double_quantize", "kQuantizeBlockwise", (256, 2, 0, 0), 4, 2),
    Theirs("double_dequantize", "kDequantizeBlockwise", (512, 64, 8, 0), 2, 8),  # and another kernel adds the offset
    Theirs("gemv_nf4", "gemm_4bit_simt", (1,), 4, 32, True, 1),
    Theirs("gemv_nf4", "kgemm_4bit_inference_naive", (128, 16), 4, 32, True, 1, HALVES),
    Theirs("gemv_nf4", "kgemm_4bit_inference_naive", (128, 32), 4, 32, True, 1, ("float32",)),
    Theirs("adamw_8bit", "kOptimizerStatic8bit2StateBlockwise", (0, 256, 1), 8, 1),
)


def bitsandbytes_report(arch: int = 90, dtype: str = "bfloat16") -> tuple[list[Report] | None, str]:
    """Report on the kernels of bitsandbytes that do a rung's work, from the installed wheel, and say where they lie.

    Returns (None, why) if it is not installed or has no machine code for `arch`; the package is not imported. With
    double quantization it launches the same kernel a second time, on the constants, which is not counted here.
    """
    _check_target(arch, dtype)
    library, kernels = _bitsandbytes(arch)
    if library is None:
        return None, "bitsandbytes is not installed, or none of its libraries holds machine code for " + f"sm_{arch}"
    reports = []
    for theirs in THEIRS:
        own_dtype = _dtype(theirs.rung, dtype)
        if own_dtype not in theirs.dtypes:
            continue
        parts = "".join(f"Li{argument}E" for argument in theirs.arguments)
        start = f"_Z{len(theirs.name)}{theirs.name}I{MANGLED[own_dtype]}{parts}E"
        text, used = next((value for name, value in kernels.items() if name.startswith(start)), (None, None))
        if text is None:
            return None, f"{library} has no kernel {start}...: another version of bitsandbytes; 0.50.2 is known"
        spelled = f"{theirs.name}<{', '.join([SPELLED[own_dtype], *map(str, theirs.arguments)])}>"
        tile = theirs.weights * 32 * theirs.warps
        code = Code(spelled, text, "", theirs.warps, **used, tile=tile, tokens=theirs.tokens)
        reports.append(_read(theirs.rung, arch, own_dtype, code, theirs.loop))
    return reports, f"machine code for sm_{arch} of {library}"


@lru_cache
def _bitsandbytes(arch: int) -> tuple[str | None, dict[str, tuple[str, dict]]]:
    """Name of the newest library with machine code for `arch`, and kernel -> its text and resources."""
    package = find_spec("bitsandbytes")
    files = list(Path(package.submodule_search_locations[0]).glob("libbitsandbytes_cuda*.so")) if package else []
    for library in sorted(files, key=lambda path: int(re.sub(r"\D", "", path.stem)), reverse=True):
        with tempfile.TemporaryDirectory() as folder:
            extract = [_tool("cuobjdump"), "-xelf", f"sm_{arch}.cubin", library]
            subprocess.run(extract, cwd=folder, capture_output=True)  # fails on a library that holds no code at all
            for cubin in Path(folder).iterdir():
                used = _resources(cubin)
                texts = machine_code.sections(_run("nvdisasm", "-c", cubin))
                return library.name, {name: (text, used[name]) for name, text in texts.items() if name in used}
    return None, {}


if __name__ == "__main__":
    _main(*sys.argv[1:])
