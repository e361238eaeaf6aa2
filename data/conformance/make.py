"""Make the conformance vectors: inputs, and what the definition of NF4 and FP4 makes of them, in exact arithmetic.

    python data/conformance/make.py            writes cases.json and vectors.safetensors beside this file

In: the cases below. Out: a checkpoint by bitsandbytes' key names, with `CASE.input` and `CASE.decoded` beside each.
Every operation is computed on fractions of whole numbers and then rounded once, to nearest even, by `rounded`. Nothing
of QLoRA Lab, torch, numpy or bitsandbytes runs here: README.md says which line of bitsandbytes each step restates.
"""

import hashlib
import json
import math
import struct
from fractions import Fraction
from pathlib import Path
from random import Random

HERE = Path(__file__).parent
FORMATS = {"float32": (24, -126), "bfloat16": (8, -126), "float16": (11, -14)}  # digits, least exponent of a normal
LARGEST = {"float32": 2**128 - 2**104, "bfloat16": 2**128 - 2**120, "float16": 65504}
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "uint8": "U8"}  # in safetensors
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}  # bytes
TINY = 1e-38  # constants below it divide as if they were it
GROUP = 256  # constants that share a scale


# ---------------------------------------------------------------------------------------------------- exact arithmetic


def rounded(x: Fraction, dtype: str = "float32") -> float:
    """The nearest number of this dtype, ties to even; infinity beyond the largest. A float holds each of them."""
    if x == 0:
        return 0.0
    digits, least = FORMATS[dtype]
    exponent = math.frexp(float(abs(x)))[1] - 1
    if Fraction(2) ** exponent > abs(x):  # float() had rounded up to a power of two
        exponent -= 1
    step = Fraction(2) ** (max(exponent, least) - digits + 1)
    near = round(x / step) * step  # Python rounds a half to the even neighbour
    return float(near) if abs(near) <= LARGEST[dtype] else math.copysign(math.inf, near)


def times(a: float, b: float, dtype: str = "float32") -> float:
    """A product, rounded once. A zero has the sign of `a`."""
    return rounded(Fraction(a) * Fraction(b), dtype) or math.copysign(0.0, a)


def up(x: float) -> float:
    """The next float32 above x."""
    bits = struct.unpack("<i", struct.pack("<f", x))[0]
    return struct.unpack("<f", struct.pack("<i", bits + 1 if x > 0 else (bits - 1 if x < 0 else 1)))[0]


def down(x: float) -> float:
    return -up(-x)


# -------------------------------------------------------------------------------------------------------------- tables


def published_nf4() -> list[float]:
    return json.loads((HERE.parent / "published" / "nf4.json").read_text("utf-8"))["levels"]


def published_fp4() -> list[float]:
    """bitsandbytes' functional.py, get_4bit_type, in twelfths and by bit pattern; code 8 is -0."""
    half = [rounded(Fraction(n) / 12) for n in (0, Fraction(1, 16), 8, 12, 4, 6, 2, 3)]
    return half + [-level for level in half]


def dynamic_map() -> list[float]:
    """bitsandbytes' create_dynamic_map: the middles of equal steps in seven decades, both signs, 0 and 1."""
    positive = []
    for decade in range(7):
        steps = 2**decade
        first = rounded(Fraction(1, 10))
        step = rounded(Fraction(rounded(1 - Fraction(first))) / steps)
        edges = []  # of torch.linspace in float32 where a multiply and an add are rounded once, counted from both ends
        for i in range(steps + 1):
            from_start = Fraction(first) + i * Fraction(step)
            edges.append(rounded(from_start if i < (steps + 1) // 2 else 1 - (steps - i) * Fraction(step)))
        for low, high in zip(edges, edges[1:], strict=False):
            middle = rounded(Fraction(rounded(Fraction(low) + Fraction(high))) / 2)
            positive.append(times(rounded(Fraction(10) ** (decade - 6)), middle))
    return sorted([-p for p in positive] + [0.0, 1.0] + positive)


LEVELS = {"nf4": published_nf4(), "fp4": published_fp4()}
MAP = dynamic_map()


def midpoints(levels: list[float]) -> list[float]:
    """Where rounding passes from a level to the next, for ascending levels: float32, as bitsandbytes compares."""
    pairs = zip(levels, levels[1:], strict=False)
    return [rounded(Fraction(rounded(Fraction(low) + Fraction(high))) / 2) for low, high in pairs]


# ---------------------------------------------------------------------------------------------------- the definition


def scaled(values: list[float], constant: float) -> list[float]:
    """Multiply by the rounded reciprocal, and stay within [-1, 1]."""
    reciprocal = rounded(1 / Fraction(max(constant, rounded(Fraction(TINY)))))
    return [max(-1.0, min(1.0, times(value, reciprocal))) for value in values]


def rank(value: float, bounds: list[float]) -> int:
    """How many bounds lie below: a value on a bound, a tie, goes to the lower level."""
    return sum(value > bound for bound in bounds)


def codes_of(kind: str, values: list[float], constant: float) -> list[int]:
    """The nearest levels' codes. FP4 has a sign bit: what rounds to zero from below is code 8, all other zeros 0."""
    levels = LEVELS[kind]
    ascending = sorted(set(levels))  # set: FP4's two zeros are equal
    bounds = midpoints(ascending)
    nearest = [ascending[rank(value, bounds)] for value in scaled(values, constant)]
    if kind == "nf4":
        return [levels.index(level) for level in nearest]
    return [
        levels.index(abs(level)) + 8 * (level < 0 or level == 0 > v) for level, v in zip(nearest, values, strict=True)
    ]


def quantised(kind: str, values: list[float], block: int) -> tuple[bytes, list[float]]:
    """Packed codes, first code in the high half of a byte, and block constants."""
    codes = []
    constants = []
    for start in range(0, len(values), block):
        part = values[start : start + block]
        constants.append(max(map(abs, part)))
        codes += codes_of(kind, part, constants[-1])
    codes += codes_of(kind, [0.0], 1.0) * (len(codes) % 2)  # an odd one out shares its byte with a zero
    return bytes(16 * high + low for high, low in zip(codes[::2], codes[1::2], strict=True)), constants


def nested(constants: list[float]) -> tuple[bytes, list[float], float]:
    """Constants, quantised: 8-bit codes, a scale for each 256, and the mean that is taken off first."""
    offset = rounded(sum(map(Fraction, constants)) / len(constants))
    centred = [rounded(Fraction(c) - Fraction(offset)) for c in constants]
    bounds = midpoints(MAP)
    codes = []
    scales = []
    for start in range(0, len(centred), GROUP):
        part = centred[start : start + GROUP]
        scales.append(max(map(abs, part)))
        codes += [rank(value, bounds) for value in scaled(part, scales[-1])]
    return bytes(codes), scales, offset


def undone(codes: bytes, scales: list[float], offset: float) -> list[float]:
    """The constants that nested codes stand for: a product and a sum, each rounded."""
    return [rounded(Fraction(times(MAP[code], scales[i // GROUP])) + Fraction(offset)) for i, code in enumerate(codes)]


def decoded(case: dict, packed: bytes, constants: list[float]) -> list[float]:
    """Level times constant in float32, then rounded to the dtype of the weight."""
    codes = [half for byte in packed for half in (byte >> 4, byte & 15)][: len(case["values"])]
    products = [times(LEVELS[case["kind"]][code], constants[i // case["block"]]) for i, code in enumerate(codes)]
    return [rounded(Fraction(p), case["dtype"]) or math.copysign(0.0, p) for p in products]


# --------------------------------------------------------------------------------------------------------------- cases


def case(name: str, why: str, values: list[float], **options) -> dict:
    """A case; `options` replace what most have. refused: an input that has no result."""
    chosen = {"kind": "nf4", "block": 64, "dtype": "float32", "nested": False, "storage": "uint8", "refused": False}
    return {"name": name, "why": why, "values": values, "shape": [len(values)]} | chosen | options


def drawn(seed: int, n: int, dtype: str = "float32", scale: float = 1.0, least: float = 0.02) -> list[float]:
    """Numbers like weights, as the sum of twelve uniform ones: no function of a machine's library decides a bit.

    least: no magnitude below it, so that FP4 meets no value that it rounds to zero.
    """
    random = Random(seed)
    found = [math.fsum(random.random() for _ in range(12)) - 6 for _ in range(n)]
    return [rounded(Fraction(math.copysign(max(abs(x), least), x)) * Fraction(scale), dtype) for x in found]


def around(bounds: list[float]) -> list[float]:
    """Each bound, and its two neighbours in float32."""
    return [value for bound in bounds for value in (down(bound), bound, up(bound))]


def ties(kind: str) -> list[float]:
    """FP4's two bounds beside zero are left to another case."""
    bounds = midpoints(sorted(set(LEVELS[kind])))
    found = [1.0, *around([b for b in bounds if kind == "nf4" or abs(b) > 0.01])]
    return found + [0.0] * (-len(found) % 64)


def with_maxima(maxima: list[float], block: int, dtype: str) -> list[float]:
    """Blocks with these largest magnitudes, whose other weights are drawn."""
    found = []
    for seed, largest in enumerate(maxima):
        others = drawn(seed, block - 1, dtype, least=0.04)
        found += [largest, *(rounded(Fraction(x) * Fraction(largest) / 8, dtype) for x in others)]
    return found


def every_bfloat16() -> list[float]:
    """All bf16 numbers of magnitude 1/8 to 1: 128 for each of 3 exponents, both signs, in blocks that begin with 1."""
    numbers = [(1 + Fraction(m, 128)) * Fraction(2) ** e for e in range(-3, 0) for m in range(128)]
    signed = [float(sign * number) for number in numbers for sign in (1, -1)]
    found = [x for start in range(0, len(signed), 63) for x in [1.0, *signed[start : start + 63]]]
    return found + [0.0] * (-len(found) % 64)


def near_tie() -> list[float]:
    """A partial block in which multiplying by 1 / absmax and dividing by absmax give two codes."""
    random = Random(0)
    bounds = midpoints(LEVELS["nf4"])
    while True:
        constant = rounded(Fraction(random.randrange(2**23, 2**24), 2**23))
        value = rounded(Fraction(random.choice(bounds[8:])) * Fraction(constant))
        quotient = rounded(Fraction(value) / Fraction(constant))
        if rank(scaled([value], constant)[0], bounds) != rank(quotient, bounds):
            return [constant, value, -constant, 0.0, constant]


def second_nearest() -> list[float]:
    """48 constants, in pairs around their mean, 2, at distances just beyond midpoints of the 8-bit map."""
    step = Fraction(1, 2**15)  # sums of so few digits are exact in any order
    bounds = [b for b in midpoints(MAP) if b > 0.1]
    distances = [(Fraction(b) // step + 1) * step for b in bounds[:: len(bounds) // 23]][:23]
    return [float(2 + sign * d) for d in [Fraction(1), *distances] for sign in (1, -1)]


def cases() -> list[dict]:
    """All cases: what is equal in every dtype, then what is special."""
    return [*plain_cases(), *edge_cases(), *length_cases(), *nested_cases(), *refused_cases()]


def plain_cases() -> list[dict]:
    fp4 = [level for level in LEVELS["fp4"] if level] * 4 + [0.0] * 8
    found = [
        case("levels_nf4", "Each level of the table, so each of the 16 codes.", LEVELS["nf4"] * 4),
        case("levels_fp4", "Each level but -0.", fp4, kind="fp4"),
        case("every_bfloat16", "Every bf16 number of magnitude 1/8 to 1.", every_bfloat16(), dtype="bfloat16"),
    ]
    for seed, dtype in enumerate(FORMATS):
        for kind in LEVELS:
            why = f"Drawn weights in {dtype}: a matrix whose rows are whole blocks."
            values = drawn(seed, 256, dtype, 0.02)
            found.append(case(f"drawn_{kind}_{dtype}", why, values, kind=kind, dtype=dtype, shape=[2, 128]))
    for seed, block in enumerate((32, 128, 256, 512, 1024, 2048, 4096)):
        dtype = ("bfloat16", "float16")[seed % 2]
        why = f"A whole block of {block} and a partial one of 34."
        found.append(case(f"block_{block}", why, drawn(10 + seed, block + 34, dtype), block=block, dtype=dtype))
    for storage, kind in (("bfloat16", "nf4"), ("float16", "nf4"), ("float32", "nf4"), ("bfloat16", "fp4")):
        why = f"The packed bytes are stored as {storage} (bnb_4bit_quant_storage)."
        options = {"kind": kind, "storage": storage, "shape": [2, 64]}
        found.append(case(f"storage_{kind}_{storage}", why, drawn(30, 128), **options))
    why = "4,096 weights in bf16: enough to count codes that differ."
    many = drawn(99, 4096, "bfloat16", 0.02)
    return [*found, case("many_weights", why, many, dtype="bfloat16", shape=[32, 128])]


def edge_cases() -> list[dict]:
    outlier = [100.0] + [0.01] * 40 + [-0.01] * 23
    minus = [-0.0] * 64 + [1.0, -0.0, 0.0] + [-0.0] * 61
    huge = [3e38, -3e38, 1e38, 2e38, 1e30, -1e-30, 0.0] + [2.5e38] * 57
    tiny = [x for n in (0.001, 0.002, 0.0025) for x in (n, -n)] * 10 + [1.0, 0.0, -0.0, -1.0]
    quarter = [x / 4 for x in ties("nf4")]
    fine = [float(m * Fraction(2) ** -149) for m in (1, -1, 2**10, -(2**20), 2**22)] + [0.0] * 59
    exact = {name: [rounded(Fraction(x)) for x in values] for name, values in (("outlier", outlier), ("huge", huge))}
    signed = [rounded(Fraction(x)) or x for x in tiny]  # `or`: a Fraction has no sign of zero
    constant = [rounded(Fraction(x)) for x in [0.3] * 64 + [-0.3] * 64]
    return [
        case("zeros", "Nothing but zeros: the constant is 0, each code is that of zero.", [0.0] * 128),
        case("zero_block", "A block of zeros between two others.", drawn(1, 64) + [0.0] * 64 + drawn(2, 64)),
        case("zeros_fp4", "Nothing but zeros.", [0.0] * 128, kind="fp4"),
        case("minus_zero_nf4", "Minus zero alone, and among others: the code of zero.", minus),
        case("minus_zero_fp4", "Minus zero is not below zero: code 0.", minus, kind="fp4"),
        case("signed_zeros_fp4", "What rounds to zero keeps its sign: code 0 or 8.", signed, kind="fp4"),
        case("ties_nf4", "Each midpoint and its two neighbours: a tie goes to the lower level.", ties("nf4")),
        case("ties_nf4_quarter", "The same with a constant of 1/4, whose reciprocal is exact.", quarter),
        case("ties_fp4", "Each midpoint and its two neighbours.", ties("fp4"), kind="fp4"),
        case("constant_block", "All weights are equal: the highest and the lowest level.", constant),
        case("one_outlier", "One weight of 100 among weights of 0.01, which become zero.", exact["outlier"]),
        case("huge", "Constants whose reciprocals are subnormal.", exact["huge"]),
        case("subnormal", "Weights below the smallest normal float32, and a constant below 1e-38.", fine),
        case("near_tiny", "A constant of about 1e-37.", drawn(3, 64, scale=2.0**-124)),
        case("subnormal_bfloat16", "Subnormals of bf16.", drawn(4, 64, "bfloat16", 2.0**-129), dtype="bfloat16"),
        case("subnormal_float16", "Subnormals of fp16.", drawn(5, 64, "float16", 2.0**-17), dtype="float16"),
    ]


def length_cases() -> list[dict]:
    found = []
    for n in (1, 2, 3, 33, 63, 65, 127, 200):
        for kind in LEVELS:
            why = "One weight." if n == 1 else f"{n} weights: the last block is partial."
            found.append(case(f"length_{n}_{kind}", why, drawn(50 + n, n), kind=kind))
    rows = "Blocks cross rows"
    return [
        *found,
        case("partial_zeros", "The partial block is all zeros: its constant is 0.", drawn(6, 64) + [0.0] * 6),
        case("partial_near_tie", "1 / absmax is rounded before it multiplies, in a partial block too.", near_tie()),
        case("rows_of_96", f"{rows}, and the length of a row is even.", drawn(7, 192), shape=[2, 96]),
        case("rows_of_33", f"{rows}, and the length of a row is odd.", drawn(8, 99), shape=[3, 33]),
        case("three_dimensions", "The shape does not matter.", drawn(9, 128), shape=[2, 1, 64]),
    ]


def nested_cases() -> list[dict]:
    block = {"block": 32, "nested": True}
    twelve = [float(Fraction(16 + i, 16)) for i in range(12)]
    many = [float(Fraction(128 + 3 * i % 127, 128)) for i in range(257)]
    plain = with_maxima(twelve, 32, "float32")
    equal = with_maxima([2.0] * 6, 32, "float32")
    second = with_maxima(second_nearest(), 32, "float32")
    groups = with_maxima(many, 32, "bfloat16")
    exact = "The sum of the constants is exact, so its order does not matter"
    found = [
        case("nested_one", "One constant: it is the mean, and its scale is 0.", drawn(11, 64), nested=True),
        case("nested_equal", "Equal constants: the codes of zero.", equal, **block),
        case("nested_partial", f"{exact}; the last block is partial.", plain[:-9], **block),
        case("nested_zeros", "Blocks of zeros beside others.", [0.0] * 64 + equal, **block),
        case("nested_two_groups", "257 constants: two scales.", groups, dtype="bfloat16", **block),
        case("nested_second_nearest", "Constants beside midpoints of the 8-bit map.", second, **block),
    ]
    for dtype in FORMATS:
        for kind in LEVELS:
            options = block | {"kind": kind, "dtype": dtype, "shape": [6, 64]}
            found.append(case(f"nested_{kind}_{dtype}", f"{exact}.", with_maxima(twelve, 32, dtype), **options))
    for storage in ("bfloat16", "float32"):
        why = f"Nested, and the packed bytes are stored as {storage}."
        found.append(case(f"nested_storage_{storage}", why, plain, storage=storage, shape=[6, 64], **block))
    return found


def refused_cases() -> list[dict]:
    found = []
    for name, value in (("nan", math.nan), ("inf", math.inf), ("minus_inf", -math.inf)):
        values = [1.0] * 70 + [value] + [1.0] * 57
        why = f"A weight of {value}: there is no result, so it is refused."
        found.append(case(f"refused_{name}", why, values, refused=True))
    values = [math.nan] * 64
    return [*found, case("refused_nan_nested", "The same with nested constants.", values, nested=True, refused=True)]


# ----------------------------------------------------------------------------------------------------------- the files


def as_bytes(values: list[float], dtype: str) -> bytes:
    if dtype == "float16":
        return struct.pack(f"<{len(values)}e", *values)
    raw = struct.pack(f"<{len(values)}f", *values)
    return raw if dtype == "float32" else b"".join(raw[i + 2 : i + 4] for i in range(0, len(raw), 4))  # the upper half


def tensors_of(case: dict) -> dict[str, tuple[str, list[int], bytes]]:
    """Name -> dtype, shape and bytes of a case's tensors."""
    name = case["name"]
    dtype = case["dtype"]
    shape = case["shape"]
    found = {f"{name}.input": (dtype, shape, as_bytes(case["values"], dtype))}
    if case["refused"]:
        return found
    packed, constants = quantised(case["kind"], case["values"], case["block"])
    key = f"{name}.weight"
    state = {"quant_type": case["kind"], "blocksize": case["block"], "dtype": dtype, "shape": shape}
    if case["nested"]:
        codes, scales, offset = nested(constants)
        constants = undone(codes, scales, offset)
        found[f"{key}.absmax"] = ("uint8", [len(codes)], codes)
        found[f"{key}.nested_absmax"] = ("float32", [len(scales)], as_bytes(scales, "float32"))
        found[f"{key}.nested_quant_map"] = ("float32", [256], as_bytes(MAP, "float32"))
        state |= {"nested_blocksize": GROUP, "nested_dtype": "float32", "nested_offset": offset}
    else:
        found[f"{key}.absmax"] = ("float32", [len(constants)], as_bytes(constants, "float32"))
    found[key] = (case["storage"], [len(packed) // ITEM[case["storage"]], 1], packed)
    found[f"{key}.quant_map"] = ("float32", [16], as_bytes(LEVELS[case["kind"]], "float32"))
    text = json.dumps(state).encode()
    found[f"{key}.quant_state.bitsandbytes__{case['kind']}"] = ("uint8", [len(text)], text)
    return found | {f"{name}.decoded": (dtype, shape, as_bytes(decoded(case, packed, constants), dtype))}


def safetensors(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """Length of the header in 8 bytes, the header as JSON, and the tensors one behind the other, widest dtype first."""
    header = {"__metadata__": {"format": "pt"}}
    data = b""
    for name in sorted(tensors, key=lambda name: (-ITEM[tensors[name][0]], name)):
        dtype, shape, raw = tensors[name]
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def files() -> dict[str, bytes]:
    """Name -> content of the two files."""
    made = cases()
    tensors = {}
    for one in made:
        tensors |= tensors_of(one)
    vectors = safetensors(tensors)
    index = {"version": 1, "licence": "CC0-1.0", "vectors_sha256": hashlib.sha256(vectors).hexdigest()}
    listed = [{name: value for name, value in one.items() if name != "values"} for one in made]
    lines = ",\n".join(json.dumps(one) for one in listed)
    text = f'{json.dumps(index)[:-1]},\n"cases": [\n{lines}\n]}}\n'
    return {"vectors.safetensors": vectors, "cases.json": text.encode()}


if __name__ == "__main__":
    for name, content in files().items():
        (HERE / name).write_bytes(content)
