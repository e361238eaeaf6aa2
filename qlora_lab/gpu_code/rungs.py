"""How each Triton kernel is launched, so that aot.py compiles what runs: signatures, constants and tiles."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

DTYPES = {"float32": ("fp32", 4), "bfloat16": ("bf16", 2), "float16": ("fp16", 2)}  # Triton's name, bytes
HALVES = ("bfloat16", "float16")
# what a layer has by default
BLOCK_SIZE = 64  # weights
GROUP_SIZE = 256  # constants
RANK = 16  # of its adapter


@dataclass(frozen=True)
class Rung:
    """How a kernel is launched for a layer whose sides are multiples of 128; weights are NF4, constants quantised."""

    signature: str  # the arguments that are not constants, "name:type ..."; T is the dtype asked for
    launch: Callable[[ModuleType], dict]  # the rung's module -> constants and options, as its launcher passes them
    tile: tuple[str | int, ...]  # constants or numbers: their product is the weights of a program, or of a loop's pass
    least: tuple[float, float]  # bytes that a weight costs at least: a fixed part, and one times the dtype's bytes
    loop: bool = False  # one pass of the main loop is counted, not the whole program
    tokens: str | int | None = None  # of a tile, for a product
    share: float = 1.0  # numbers per weight of the matrix: where they are constants, "weight" means a constant
    dtypes: tuple[str, ...] = tuple(DTYPES)
    module: str | None = None  # where the kernel is, if not in a module of its own name


def _tile(module: ModuleType) -> dict[str, int]:
    return {name: getattr(module, name) for name in ("TOKENS", "ROWS", "COLUMNS")}


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
