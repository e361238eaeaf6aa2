"""Compile the Triton kernels for GPUs that are not here, and read the machine code.

    rung, architecture, dtype -> registers, spills, occupancy, instructions and bytes for each weight

Triton brings NVIDIA's assembler and disassembler, and needs no GPU for them. Kernels are compiled in a child process,
because under TRITON_INTERPRET=1 a process cannot compile, and results are kept for the life of this one. RUNGS says how
each kernel is launched; tile sizes are read from the rung's own module, so what is compiled is what is launched.

"Instructions for each weight" are those that one thread executes in a full tile, over the weights it handles there; for
a kernel with a loop, those of one pass of the loop. machine_code.py says which way is counted where code branches.

Not here: a measured time. roofline() is arithmetic on data sheets.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from math import ceil, prod
from pathlib import Path
from types import ModuleType

from qlora_lab.gpu_code import machine_code
from qlora_lab.gpu_code.cards import CARDS, LIMITS, Roof, occupancy, roof

ARCHS = tuple(LIMITS)
DTYPES = {"float32": ("fp32", 4), "bfloat16": ("bf16", 2), "float16": ("fp16", 2)}  # Triton's name, bytes
HALVES = ("bfloat16", "float16")
# what a layer has by default
BLOCK_SIZE = 64  # weights
GROUP_SIZE = 256  # constants
RANK = 16  # of its adapter


@dataclass(frozen=True)
class Rung:
    """How a kernel is launched for a layer whose sides are multiples of 128; weights are NF4, constants quantised.

    signature: the arguments that are no constants, "name:type ...", where T is the dtype asked for; launch: the rung's
    module -> constants and options, as its launcher passes them; tile: constants (or numbers) whose product is how many
    weights a program takes, or one pass of its loop; least: bytes that a weight costs at least, as (fixed, times the
    bytes of the dtype); tokens: of a tile, for a product; share: of a weight matrix, how many numbers it handles (where
    they are not weights but their constants, "weight" means a constant); module: where the kernel is, if not in one of
    its own name.
    """

    signature: str
    launch: Callable[[ModuleType], dict]
    tile: tuple[str | int, ...]
    least: tuple[float, float]
    loop: bool = False
    tokens: str | int | None = None
    share: float = 1.0
    dtypes: tuple[str, ...] = tuple(DTYPES)
    module: str | None = None


PACKED = 0.5 + 1 / BLOCK_SIZE + 4 / (BLOCK_SIZE * GROUP_SIZE)  # bytes of a weight and its share of codes and scales
WEIGHT = "words:*i32 absmax:*u8 scale:*fp32 offset:*fp32 table:*fp32 levels:*fp32"
QUANTISED = {"BLOCK_SIZE": BLOCK_SIZE, "GROUP_SIZE": GROUP_SIZE}
RUNGS = {
    "quantize_nf4": Rung(
        "weight:*T tree:*fp32 order:*i32 words:*i32 absmax:*fp32 numel:i32 n_words:i32 tiny:fp32",
        lambda m: {"BLOCK_SIZE": BLOCK_SIZE, "TILE": m.TILE, "num_warps": 1},
        tile=("TILE",), least=(0.5 + 4 / BLOCK_SIZE, 1),
    ),
    "dequantize_nf4": Rung(
        "words:*i32 absmax:*fp32 levels:*fp32 out:*T n_words:i32 numel:i32",
        lambda m: {"BLOCK_SIZE": BLOCK_SIZE, "TILE": m.TILE, "num_warps": 1},
        tile=("TILE",), least=(0.5 + 4 / BLOCK_SIZE, 1),
    ),
    "dequantize_double": Rung(
        "words:*i32 codes:*u8 scale:*fp32 offset:*fp32 table:*fp32 levels:*fp32 out:*T n_words:i32 numel:i32",
        lambda m: QUANTISED | {"TILE": m.TILE, "num_warps": 1} | m.NO_FUSION,
        tile=("TILE",), least=(PACKED, 1),
    ),
    "double_quantize": Rung(
        "absmax:*fp32 offset:*fp32 thresholds:*fp32 codes:*u8 scales:*fp32 n_blocks:i32 tiny:fp32",
        lambda m: {"GROUP_SIZE": GROUP_SIZE, "GROUPS": m.GROUPS} | m.NO_FUSION,
        tile=("GROUP_SIZE", "GROUPS"), least=(4 + 1 + 4 / GROUP_SIZE, 0), share=1 / BLOCK_SIZE, dtypes=("float32",),
    ),
    "double_dequantize": Rung(
        "codes:*u8 scale:*fp32 offset:*fp32 table:*fp32 out:*fp32 n_blocks:i32",
        lambda m: {"GROUP_SIZE": GROUP_SIZE, "TILE": m.TILE} | m.NO_FUSION,
        tile=("TILE",), least=(4 + 1 + 4 / GROUP_SIZE, 0), share=1 / BLOCK_SIZE, dtypes=("float32",),
        module="double_quantize",
    ),
    "gemv_nf4": Rung(
        f"x:*T {WEIGHT} y:*T n_rows:i32 n_words:i32",
        lambda m: QUANTISED | {"n_tokens": 1, "TOKENS": 1, "ROWS": m.TILES[1][0], "WORDS": m.TILES[1][1]},
        tile=("ROWS", "WORDS", 8), least=(PACKED, 0), loop=True, tokens=1,
    ),
    "matmul_nf4": Rung(
        f"x:*T {WEIGHT} u:*T lora_B:*T y:*T n_tokens:i32 n_rows:i32 n_words:i32 scaling:fp32",
        lambda m: QUANTISED | _tile(m) | {"RANK": RANK, "WIDTH": m.WIDTH, "num_warps": m.WARPS},
        tile=("ROWS", "COLUMNS"), least=(PACKED, 0), loop=True, tokens="TOKENS", dtypes=HALVES,
    ),
    "matmul_nf4_backward": Rung(
        f"grad:*T {WEIGHT} out:*T n_tokens:i32 n_rows:i32 n_words:i32",
        lambda m: QUANTISED | _tile(m) | {"num_warps": m.WARPS},
        tile=("ROWS", "COLUMNS"), least=(PACKED, 0), loop=True, tokens="TOKENS", dtypes=HALVES,
    ),
    "adamw_8bit": Rung(
        "param:*T grad:*T codes1:*u8 scale1:*fp32 codes2:*u8 scale2:*fp32 table1:*fp32 limits1:*fp32 table2:*fp32 "
        "limits2:*fp32 numel:i32 tiny:fp32 beta1:fp32 beta2:fp32 rest1:fp32 rest2:fp32 decay:fp32 size:fp32 "
        "correction:fp32 eps:fp32",
        lambda m: {"BLOCK_SIZE": m.BLOCK_SIZE, "BLOCKS": m.BLOCKS} | m.NO_FUSION,
        tile=("BLOCK_SIZE", "BLOCKS"), least=(4 + 16 / 256, 3),
    ),
}  # fmt: skip


def _tile(module: ModuleType) -> dict[str, int]:
    return {name: getattr(module, name) for name in ("TOKENS", "ROWS", "COLUMNS")}


@dataclass(frozen=True)
class Report:
    """What the machine code of one kernel says. Counts in `mix` and `moved` are for each weight.

    moved: bytes of global memory that instructions ask for (caches serve some of it); least: that must be moved.
    instructions: of the whole text, once each. accesses: opcode -> how many in the whole text.
    """

    rung: str
    kernel: str
    arch: int
    dtype: str
    warps: int
    registers: int
    shared: int  # bytes of a block
    local: int  # bytes of a thread's stack and local memory
    spills: int  # LDL and STL
    occupancy: float
    instructions: int
    weights: float  # that a thread handles in what is counted
    loop: bool  # counted is one pass of the main loop, else the whole program
    mix: dict[str, float]  # kind of instruction -> how many
    per_weight: float  # all kinds
    accesses: dict[str, int]
    moved: float
    least: float
    tokens: int | None  # of a tile, for a product


@dataclass(frozen=True)
class Code:
    """One compiled kernel, as text; resources as the assembler gave them, weights of a tile, tokens of a tile."""

    kernel: str
    sass: str
    ptx: str
    warps: int
    registers: int
    shared: int
    local: int
    tile: int
    tokens: int | None = None


def report(
    rungs: Iterable[str] | None = None,
    archs: Iterable[int] = ARCHS,
    dtype: str = "bfloat16",
    progress: bool = False,
) -> list[Report]:
    """A Report of each rung (None: all that take the dtype) for each architecture: 80, 90, 100.

    dtype: of weights and activations; what handles constants knows float32 alone, and is reported for any. The first
    call compiles, a second for each kernel; Triton keeps what it compiled on disk. Raises ValueError for what is not
    known and where Triton is missing.
    """
    archs = list(archs)
    for arch in archs:
        _check_target(arch, dtype)
    names = [name for name in RUNGS if _dtype(name, dtype) in RUNGS[name].dtypes] if rungs is None else list(rungs)
    wanted = [(name, arch, _dtype(name, dtype)) for name in names for arch in archs]
    return [_read(*key, code, RUNGS[key[0]].loop) for key, code in zip(wanted, _compile(wanted, progress), strict=True)]


def sass(rung: str, arch: int = 90, dtype: str = "bfloat16") -> str:
    """The machine code of a rung, as nvdisasm prints it. Raises ValueError like report()."""
    return _compile([(rung, arch, _dtype(rung, dtype))])[0].sass


def ptx(rung: str, arch: int = 90, dtype: str = "bfloat16") -> str:
    """The PTX of a rung, from which the assembler made its machine code. Raises ValueError like report()."""
    return _compile([(rung, arch, _dtype(rung, dtype))])[0].ptx


def check_product(shape: Sequence[int], tokens: int) -> None:
    """Raise ValueError for a side or a number of tokens below 1, or above 2^31 - 1."""
    if min(*shape, tokens) < 1 or max(*shape, tokens) >= 2**31:
        raise ValueError(f"shape={tuple(shape)} and tokens={tokens} are not allowed: each is from 1 to 2,147,483,647")


def roofline(one: Report, shape: tuple[int, int] = (4096, 4096), tokens: int = 256) -> list[Roof]:
    """The least time on each card whose code `one` is, for a weight of this shape: a model, not a measurement.

    A gemv handles the tokens it was compiled for; `tokens` is for the tensor cores' products. Memory moves every weight
    once, x and y once. Instructions are per_weight for each weight and each tile of tokens. Raises ValueError for a
    side or a number of tokens below 1.
    """
    check_product(shape, tokens)
    weights, size = prod(shape) * RUNGS[one.rung].share, DTYPES[one.dtype][1]
    tensor_cores = one.mix["tensor core"] > 0
    if one.tokens and not tensor_cores:
        tokens = one.tokens
    moved = weights * one.least + (tokens * sum(shape) * size if one.tokens else 0)
    tiles = ceil(tokens / one.tokens) if one.tokens else 1
    operations = 2 * tokens * weights if tensor_cores else 0
    instructions = one.per_weight * weights * tiles
    return [roof(card, moved, operations, one.dtype, instructions) for card in CARDS if card.arch == one.arch]


def _dtype(name: str, dtype: str) -> str:
    """`dtype`, or the only one that the rung has."""
    dtypes = RUNGS[name].dtypes if name in RUNGS else ()
    return dtypes[0] if len(dtypes) == 1 and dtype in DTYPES else dtype


def _read(rung: str, arch: int, dtype: str, code: Code, loop: bool) -> Report:
    program = machine_code.parse(code.sass)
    counted = machine_code.main_loop(program) if loop else machine_code.way(program)
    weights = code.tile / (32 * code.warps)
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
    """(rung, arch, dtype) -> Code, all that are new in one child process."""
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
        raise ValueError(f"rung {name!r:.60} is not known: {', '.join(RUNGS)}")
    _check_target(arch, dtype)
    if dtype not in RUNGS[name].dtypes:
        raise ValueError(f"{name} does not take {dtype}: it takes {', '.join(RUNGS[name].dtypes)}")


def _check_target(arch: int, dtype: str = "float32") -> None:
    if arch not in ARCHS:
        raise ValueError(f"arch={arch} is not known: compute capability times ten, {', '.join(map(str, ARCHS))}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r:.60} is not known: {', '.join(DTYPES)}")


def _child(keys: list, folder: str, progress: bool) -> Iterable[dict]:
    """What _main() prints, one dictionary for each key, while it compiles."""
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
        kernel, launch = getattr(module, f"_{name}_kernel"), rung.launch(module)
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
    found = find_spec("triton")
    if found is None:
        raise ValueError("Triton is not installed, which compiles the kernels: pip install triton, on Linux")
    path = Path(found.submodule_search_locations[0], "backends", "nvidia", "bin", name)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: this build of Triton has no tools of NVIDIA; pip install triton")
    return path


def _run(tool: str, *arguments: str | Path) -> str:
    silent = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    return subprocess.run([_tool(tool), *arguments], check=True, **silent).stdout


def _resources(cubin: Path) -> dict[str, dict[str, int]]:
    """Kernel -> registers of a thread, static shared memory of a block, stack and local memory of a thread."""
    found = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", _run("cuobjdump", "-res-usage", cubin)
    )
    return {
        name: {"registers": int(registers), "shared": int(shared), "local": int(stack) + int(local)}
        for name, registers, stack, shared, local in found
    }


# -------------------------------------------------------------------------------------------------------- bitsandbytes

MANGLED = {"float32": "f", "bfloat16": "13__nv_bfloat16", "float16": "6__half"}
SPELLED = {"float32": "float", "bfloat16": "__nv_bfloat16", "float16": "__half"}


@dataclass(frozen=True)
class Peer:
    """A kernel of bitsandbytes: template arguments behind the dtype, warps of a block, weights of a thread.

    As launched in csrc/ops.cu and csrc/gemm_4bit_simt.cu for NF4 and block size 64.
    """

    rung: str  # ours with the same work
    name: str
    arguments: tuple[int, ...]
    warps: int
    weights: int  # of a thread, in a program or in one pass of its loop
    loop: bool = False
    tokens: int | None = None
    dtypes: tuple[str, ...] = tuple(DTYPES)


PEERS = (
    Peer("quantize_nf4", "kQuantizeBlockwiseSmall", (64, 2), 1, 2),
    Peer("dequantize_nf4", "kDequantizeBlockwise", (512, 64, 8, 2), 2, 16),  # its loop runs once
    Peer("dequantize_double", "kDequantizeBlockwise", (512, 64, 8, 2), 2, 16),  # and another launch, for the constants
    Peer("double_quantize", "kQuantizeBlockwise", (256, 2, 0, 0), 4, 2),
    Peer("double_dequantize", "kDequantizeBlockwise", (512, 64, 8, 0), 2, 8),  # and another kernel adds the offset
    Peer("gemv_nf4", "gemm_4bit_simt", (1,), 4, 32, True, 1),
    Peer("gemv_nf4", "kgemm_4bit_inference_naive", (128, 16), 4, 32, True, 1, HALVES),
    Peer("gemv_nf4", "kgemm_4bit_inference_naive", (128, 32), 4, 32, True, 1, ("float32",)),
    Peer("adamw_8bit", "kOptimizerStatic8bit2StateBlockwise", (0, 256, 1), 8, 1),
)


def bitsandbytes_report(arch: int = 90, dtype: str = "bfloat16") -> tuple[list[Report] | None, str]:
    """Reports of the kernels of bitsandbytes that do a rung's work, from the installed wheel, and how they were found.

    (None, why) where it is not installed or has no machine code for `arch`; the package is not imported. For constants
    that are quantised it launches the same kernel a second time, on them: the second launch is not counted here.
    """
    _check_target(arch, dtype)
    library, kernels = _bitsandbytes(arch)
    if library is None:
        return None, "bitsandbytes is not installed, or none of its libraries holds machine code for " + f"sm_{arch}"
    found = []
    for peer in PEERS:
        known = _dtype(peer.rung, dtype)
        if known not in peer.dtypes:
            continue
        parts = "".join(f"Li{argument}E" for argument in peer.arguments)
        start = f"_Z{len(peer.name)}{peer.name}I{MANGLED[known]}{parts}E"
        text, used = next((value for name, value in kernels.items() if name.startswith(start)), (None, None))
        if text is None:
            return None, f"{library} has no kernel {start}...: another version of bitsandbytes; 0.50.2 is known"
        spelled = f"{peer.name}<{', '.join([SPELLED[known], *map(str, peer.arguments)])}>"
        tile = peer.weights * 32 * peer.warps
        code = Code(spelled, text, "", peer.warps, **used, tile=tile, tokens=peer.tokens)
        found.append(_read(peer.rung, arch, known, code, peer.loop))
    return found, f"machine code for sm_{arch} of {library}"


@lru_cache
def _bitsandbytes(arch: int) -> tuple[str | None, dict[str, tuple[str, dict]]]:
    """Name of the newest library with machine code for `arch`, and kernel -> its text and resources."""
    found = find_spec("bitsandbytes")
    files = list(Path(found.submodule_search_locations[0]).glob("libbitsandbytes_cuda*.so")) if found else []
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
