"""Wrong answers to every exercise of the course, and what a student then hears.

Each exercise runs as it is stored, in the solution's notebook, with the wrong answer in the place of the right one and
with what it needs of the cells before. That the right ones are taken is tested here, too.
"""

import inspect
import json
import linecache
import re
import textwrap
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import qlora_lab as ql
from qlora_lab.exercises import (
    check,
    hints,
    hints_answers,
    hints_merging,
    hints_methods,
    hints_packing,
    hints_results,
    hints_seeing,
)
from tools.notebooks import END, START

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SOLUTIONS_10 = {  # notebook 10 trains for minutes, and has no solution beside it
    "trainable_at_64": "return sum(64 * (out + in_) for out, in_ in shapes)",
    "bytes_for_the_adapter": "return 4 * 4 * trainable",  # weight, gradient, two moments
}
TASK = "Read the task again"
NOTHING = "Python gives None where nothing was returned"
RETURN = "Does your function end with `return`"
OPEN = "not answered yet. Replace the ... and run this cell again."

# exercise: {the mistake: (the answer, a part of the hint)}
WRONG = {
    "00 where": {
        "the halves swapped": (
            "byte, half = divmod(row * n_columns + column, 2)\nreturn byte, 'high' if half else 'low'",
            "Which weight of a pair lies in the high half",
        ),
        "one row only": ("return column // 2, 'low' if column % 2 else 'high'", "How many weights lie above it?"),
        "the weight, not the byte": (
            "number = row * n_columns + column\nreturn number, 'low' if number % 2 else 'high'",
            "How many weights does a byte hold?",
        ),
        "the half first": (
            "byte, half = divmod(row * n_columns + column, 2)\nreturn 'low' if half else 'high', byte",
            "Return the byte first",
        ),
        "a wrong type": ("return 'high'", "with a comma between them"),
        "an error": ("return row / 0", "shows the line at which it stops"),
        "nothing returned": ("print(row * n_columns + column)", RETURN),
        "the check's own": ("return by_experiment(row, column, n_columns)", "without `quantize`"),
        "the library's own": (
            "w = torch.zeros(row + 1, n_columns)\nw[row, column] = 1\n"
            "i = (ql.quantize(w).packed != 0x77).nonzero().item()\nreturn i, 'high'",
            "without `quantize`",
        ),
    },
    "00 bits_per_weight": {
        "a whole constant": ("return 4 + 32", "How many weights share it?"),
        "the constant alone": ("return 32 / block_size", "The code costs bits, too"),
        "bytes for bits": ("return 4 + 4 / block_size", "How many bits are four bytes?"),
        "upside down": ("return 4 + block_size / 32", "makes a weight dearer"),
        "a wrong type": ("return f'{4 + 32 / block_size}'", "without quotation marks"),
        "nothing returned": ("bits = 4 + 32 / block_size", RETURN),
        "the library's own": (
            "return ql.quantize(torch.ones(4096), block_size=block_size).bits_per_parameter",
            "without `quantize`",
        ),
    },
    "01 my_offset": {
        "the 4-bit offset for 3 bits": ("return 0.9677083", "That is the offset for 4 bits"),
        "not rounded": ("n = 2**bits\nreturn 1 - (1 / (n - 1) + 1 / n) / 4", "How many digits does the rule keep?"),
        "one of the two": ("return round(1 - 1 / 2 ** (bits + 1), 7)", "The rule takes the mean of both"),
        "a whole slice": ("n = 2**bits\nreturn round(1 - (1 / (n - 1) + 1 / n) / 2, 7)", "You stay a whole slice away"),
        "a wrong type": ("return [0.9677083]", TASK),
        "nothing returned": ("n = 2**bits", RETURN),
        "the library's own": ("return normal_offset(bits)", "without `normal_offset`"),
        "the library's own, inside": (
            "return float(norm.cdf(norm.ppf(normal_offset(bits))))",
            "without `normal_offset`",
        ),
    },
    "01 my_nf3": {
        "the library's own, mirrored twice": ("return -(-ql.codebook('nf3'))", "without `codebook`"),
        "the halves swapped, by hand": (
            "o = normal_offset(3)\nup = norm.ppf(torch.linspace(o, 0.5, 4)[:-1])\n"
            "down = -norm.ppf(torch.linspace(o, 0.5, 5)[:-1])\n"
            "levels = torch.tensor(np.sort([*down, 0.0, *up])).float()\nreturn levels / levels.abs().max()",
            "The halves are swapped",
        ),
        "the 4-bit offset for 3 bits": (
            "o = normal_offset(4)\nup = norm.ppf(torch.linspace(o, 0.5, 5)[:-1])\n"
            "down = -norm.ppf(torch.linspace(o, 0.5, 4)[:-1])\n"
            "levels = torch.tensor(np.sort([*down, 0.0, *up])).float()\nreturn levels / levels.max()",
            "You took the offset for 4 bits",
        ),
        "not divided": (
            "o = normal_offset(3)\nup = norm.ppf(torch.linspace(o, 0.5, 5)[:-1])\n"
            "down = -norm.ppf(torch.linspace(o, 0.5, 4)[:-1])\n"
            "return torch.tensor(np.sort([*down, 0.0, *up])).float()",
            "What should the largest level be?",
        ),
        "a wrong type": ("return [-1.0, 0.0, 1.0]", "makes a tensor of a list"),
        "float64": (
            "o = normal_offset(3)\nup = norm.ppf(torch.linspace(o, 0.5, 5)[:-1])\n"
            "down = -norm.ppf(torch.linspace(o, 0.5, 4)[:-1])\n"
            "levels = torch.tensor(np.sort([*down, 0.0, *up]))\nreturn levels / levels.max()",
            "changes the dtype",
        ),
        "nothing returned": ("levels = torch.zeros(8)", RETURN),
        "the library's own": ("return ql.codebook('nf3')", "without `codebook`"),
        "the library's own maker": ("return ql.normal_float(3)", "without `normal_float`"),
    },
    "02 my_pack": {
        "the halves swapped": (
            "codes = torch.nn.functional.pad(codes, (0, len(codes) % 2), value=7)\n"
            "return codes[0::2] + 16 * codes[1::2]",
            "Which code lies in the high half?",
        ),
        "filled with 0": (
            "codes = torch.nn.functional.pad(codes, (0, len(codes) % 2))\nreturn codes[0::2] * 16 + codes[1::2]",
            "Which code of NF4 is the level 0?",
        ),
        "the last one lost": (
            "even = codes[: len(codes) // 2 * 2]\nreturn even[0::2] * 16 + even[1::2]",
            "What does it share its byte with?",
        ),
        "three places": ("return codes[0:1] << 3 | codes[1:2]", "How many bits does a code have?"),
        "not packed": ("return codes", "a byte of its own"),
        "another dtype": (
            "codes = torch.nn.functional.pad(codes.int(), (0, len(codes) % 2), value=7)\n"
            "return codes[0::2] * 16 + codes[1::2]",
            "What dtype does a byte have?",
        ),
        "a wrong type": ("return [58]", "makes a tensor of a list"),
        "nothing returned": ("codes = codes[0::2] * 16 + codes[1::2]", RETURN),
        "the library's own": ("return packing.pack(codes, fill=7)", "without `pack`"),
    },
    "02 my_low_first": {
        "the high half first": (
            "return torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:numel]",
            "Which one comes first here?",
        ),
        "all low halves first": (
            "return torch.cat([packed & 15, packed >> 4])[:numel]",
            "Which weights are neighbours?",
        ),
        "with the padding": (
            "return torch.stack([packed & 15, packed >> 4], dim=1).flatten()",
            "the last half may be padding",
        ),
        "pairs": ("return torch.stack([packed & 15, packed >> 4], dim=1)", "How do they become one row?"),
        "the low halves alone": ("return packed & 15", "These are the low halves alone"),
        "a wrong type": ("return 58", TASK),
        "nothing returned": ("low, high = packed & 15, packed >> 4", RETURN),
        "the library's own": ("return packing.unpack(packed << 4 | packed >> 4, numel)", "without `unpack`"),
    },
    "02 my_weight": {
        "the level": (
            "i = row * shape[1] + column\nbyte = int(packed[i // 2])\n"
            "return ql.codebook('nf4')[byte & 15 if i % 2 else byte >> 4].item()",
            "By what was the weight divided?",
        ),
        "the other half": (
            "i = row * shape[1] + column\nbyte = int(packed[i // 2])\n"
            "return (ql.codebook('nf4')[byte >> 4 if i % 2 else byte & 15] * absmax[i // 64]).item()",
            "Which half is yours?",
        ),
        "a constant for each row": (
            "i = row * shape[1] + column\nbyte = int(packed[i // 2])\n"
            "return (ql.codebook('nf4')[byte & 15 if i % 2 else byte >> 4] * absmax[row]).item()",
            "How many weights share one?",
        ),
        "blocks of bytes": (
            "i = row * shape[1] + column\nbyte = int(packed[i // 2])\n"
            "return (ql.codebook('nf4')[byte & 15 if i % 2 else byte >> 4] * absmax[i // 2 // 64]).item()",
            "How many weights are in a block?",
        ),
        "the code": (
            "i = row * shape[1] + column\nbyte = int(packed[i // 2])\nreturn byte & 15 if i % 2 else byte >> 4",
            "Which level does it stand for?",
        ),
        "a wrong type": ("return [packed]", TASK),
        "nothing returned": ("i = row * shape[1] + column", RETURN),
        "the library's own": (
            "q = replace(small, packed=packed, constants=absmax)\nreturn ql.dequantize(q)[row, column].item()",
            "without `dequantize`",
        ),
    },
    "03 my_block_size": {
        "less than, not at most": (
            "return next(2**i for i in range(4, 20) if 32 / 2**i < share * bits)",
            "exactly is allowed",
        ),
        "a share of codes and constants": (
            "return next(2**i for i in range(4, 20) if 32 / 2**i <= share * (bits + 32 / 2**i))",
            "speaks of the bits of the codes alone",
        ),
        "no power of two": ("return 32 / (share * bits)", "Which sizes may a block have?"),
        "a wrong type": ("return str(round(32 / (share * bits)))", "without quotation marks"),
        "nothing returned": ("size = 32 / (share * bits)", RETURN),
        "the check's own": ("return by_trying(bits, share)", "without `quantize`"),
    },
    "03 my_damage": {
        "summed over tokens": (
            "return (off.square() @ x.square().sum(0)).sum().item()",
            "more tokens make more damage",
        ),
        "the squared mean": ("return (off.square() @ x.mean(0).square()).sum().item()", "square the mean of an input"),
        "on these tokens": ("return (x @ off.T).square().sum(1).mean().item()", "products of two inputs are gone"),
        "without inputs": ("return off.square().sum().item()", "You leave the inputs out"),
        "a wrong type": ("return off.square() @ x.square().mean(0)", "`.item()` takes the number out"),
        "nothing returned": ("damage = (off.square() @ x.square().mean(0)).sum()", RETURN),
        "the check's own": ("return expected(off, x)", "without the function that checks it"),
        "the check's own, copied": (
            "s = [(x[:, j] ** 2).mean().item() for j in range(3)]\n"
            "return sum(off[i, j].item() ** 2 * s[j] for i in range(4) for j in range(3))",
            "without the function that checks it",
        ),
    },
    "03 my_plan": {
        "too dear": ("return [row.index(min(row)) for row in error]", "What do they cost together?"),
        "too cheap": ("return [row.index(min(row)) for row in bits]", "Is there budget left"),
        "a wrong type": ("return len(error)", TASK),
        "nothing returned": ("ways = itertools.product(range(3), repeat=len(error))", RETURN),
        "an error": ("return min(w for w in error if w > budget)", "shows the line at which it stops"),
        "the library's own": ("return by_programme(error, bits, budget)", "without `best_plan`"),
    },
    "04 my_bits": {
        "no scales": ("return 8 / block_size", "The scales are missing"),
        "a scale for weights": ("return 8 / block_size + 32 / group_size", "How many weights are that?"),
        "with the codes": ("return 4 + 8 / block_size + 32 / (block_size * group_size)", "constants alone"),
        "a wrong type": ("return torch.tensor([8 / block_size])", "`.item()` takes the number out"),
        "nothing returned": ("scales = 32 / (block_size * group_size)", RETURN),
        "the library's own": ("return constant_bits(block_size, group_size)[1]", "without `constant_bits`"),
    },
    "04 my_absmax": {
        "no offset": (
            "return dq.dynamic_map()[codes.int()] * scale.repeat_interleave(256)[: len(codes)]",
            "Something was subtracted",
        ),
        "the first scale for all": (
            "return dq.dynamic_map()[codes.int()] * scale[0] + offset",
            "the first scale for all",
        ),
        "repeat": (
            "return dq.dynamic_map()[codes.int()] * scale.repeat(256)[: len(codes)] + offset",
            "are neighbours equal?",
        ),
        "codes as values": ("return codes * scale.repeat_interleave(256)[: len(codes)] + offset", "Into which table?"),
        "a wrong type": ("return codes.tolist()", "makes a tensor of a list"),
        "an error": ("return dq.dynamic_map()[codes.int()] * scale + offset", "shows the line at which it stops"),
        "nothing returned": ("values = dq.dynamic_map()[codes.int()]", RETURN),
        "the library's own": (
            "return dq.double_dequantize(dq.DoubleQuantized(codes, scale, offset))",
            "without `double_dequantize`",
        ),
    },
    "04 my_map": {
        "not sorted": (
            "steps = [torch.linspace(0.1, 1, 2**i + 1) for i in range(7)]\n"
            "up = torch.cat([10.0 ** (i - 6) * (s[:-1] + s[1:]) / 2 for i, s in enumerate(steps)])\n"
            "return torch.cat([-up, torch.tensor([0.0, 1.0]), up])",
            "not in ascending order",
        ),
        "edges, not middles": (
            "up = torch.cat([10.0 ** (i - 6) * torch.linspace(0.1, 1, 2**i + 1)[1:] for i in range(7)])\n"
            "return torch.cat([-up, torch.tensor([0.0, 1.0]), up]).sort().values",
            "You take an edge of each step",
        ),
        "a decade too low": (
            "steps = [torch.linspace(0.1, 1, 2**i + 1) for i in range(7)]\n"
            "up = torch.cat([10.0 ** (i - 7) * (s[:-1] + s[1:]) / 2 for i, s in enumerate(steps)])\n"
            "return torch.cat([-up, torch.tensor([0.0, 1.0]), up]).sort().values",
            "too low by a factor of ten",
        ),
        "a wrong type": ("return list(range(256))", "makes a tensor of a list"),
        "nothing returned": ("up = torch.zeros(127)", RETURN),
        "the library's own": ("return dq.dynamic_map()", "without `dynamic_map`"),
    },
    "05 my_shifts": {
        "the halves swapped": ("my_shifts = list(range(0, 32, 4))", "the halves are swapped"),
        "the last byte first": ("my_shifts = [28, 24, 20, 16, 12, 8, 4, 0]", "You begin with the last byte"),
        "a wrong type": ("my_shifts = 'four, zero'", TASK),
        "texts in the list": ("my_shifts = ['4', '0']", "which half comes first?"),
        "nothing": ("my_shifts = None", NOTHING),
        "the codes themselves": ("my_shifts = eight", "which half comes first?"),
    },
    "05 my_constants": {
        "the store not masked": (
            "i = tl.arange(0, LANES)\nv = tl.load(table + tl.load(codes + i, mask=i < n, other=0))\n"
            "tl.store(out + i, v * tl.load(scale) + tl.load(offset))",
            "what about the store?",
        ),
        "no offset": (
            "i = tl.arange(0, LANES)\nv = tl.load(table + tl.load(codes + i, mask=i < n, other=0))\n"
            "tl.store(out + i, v * tl.load(scale), mask=i < n)",
            "The offset is missing",
        ),
        "the code as a value": (
            "i = tl.arange(0, LANES)\nv = tl.load(codes + i, mask=i < n, other=0)\n"
            "tl.store(out + i, v * tl.load(scale) + tl.load(offset), mask=i < n)",
            "What is it an index of?",
        ),
        "a wrong type": ("tl.store(out, 'five')", "What is loaded first?"),
        "nothing stored": ("i = tl.arange(0, LANES)", OPEN),
        "the library's own": ("double_dequantize(codes)", "What is loaded first?"),
    },
    "05 my_tokens": {
        "the last that pays": ("return int(once // again) * tile", "With which one does it stop?"),
        "tiles": ("return int(once // again)", "How many tokens are in one?"),
        "a tile in parts": ("return int(once / again * tile) + 1", "costs as much as all of it"),
        "a tile too far": ("return (int(once // again) + 1) * tile", "One tile too far"),
        "a wrong type": ("return [once // again]", TASK),
        "nothing returned": ("tiles = once // again", RETURN),
        "the library's own": (
            "c = [again * (t // tile + (t % tile > 0)) for t in n]\n"
            "return roofline.stops_paying(n, c, [once] * len(n))",
            "without `stops_paying`",
        ),
    },
    "06 first_wrong": {
        "not scaled": (
            "near = (levels - weights[:, None]).abs().argmin(1)\n"
            "return [a == b for a, b in zip(near.tolist(), codes)].index(False)",
            "Which step comes before?",
        ),
        "the largest, not the largest magnitude": (
            "near = (levels - (weights / weights.max())[:, None]).abs().argmin(1)\n"
            "return [a == b for a, b in zip(near.tolist(), codes)].index(False)",
            "Can a negative one have the larger magnitude?",
        ),
        "counted from 1": (
            "near = (levels - (weights / weights.abs().max())[:, None]).abs().argmin(1)\n"
            "return 1 + [a == b for a, b in zip(near.tolist(), codes)].index(False)",
            "From where does an index count?",
        ),
        "a wrong type": ("return codes", TASK),
        "nothing returned": ("near = weights / weights.abs().max()", RETURN),
        "the library's own": (
            "right = ql.quantize(weights, levels, block_size=16).codes.tolist()\n"
            "return [a == b for a, b in zip(right, codes)].index(False)",
            "without `quantize`",
        ),
    },
    "06 my_block": {
        "the largest, not the largest magnitude": (
            "a = weights.max().clamp(min=1e-38)\nreturn levels[(levels - (weights / a)[:, None]).abs().argmin(1)] * a",
            "Can a negative one have the larger magnitude?",
        ),
        "not scaled back": (
            "a = weights.abs().max().clamp(min=1e-38)\n"
            "return levels[(levels - (weights / a)[:, None]).abs().argmin(1)]",
            "The weights had another size",
        ),
        "zeros": (
            "a = weights.abs().max()\nreturn levels[(levels - (weights / a)[:, None]).abs().argmin(1)] * a / a * a",
            "0 / 0 is NaN",
        ),
        "codes, in whole numbers": (
            "return (levels - (weights / weights.abs().max())[:, None]).abs().argmin(1)",
            "These are codes",
        ),
        "a wrong type": ("return weights.tolist()", "makes a tensor of a list"),
        "nothing returned": ("absmax = weights.abs().max()", RETURN),
        "the library's own": ("return ql.dequantize(ql.quantize(weights, levels))", "without `quantize`"),
    },
    "06 my_levels": {
        "INT4": ("my_levels = torch.linspace(-1, 1, 17)[1:]", "Levels should be dense there"),
        "no zero": ("my_levels = torch.linspace(-1, 1, 16)", "where is zero?"),
        "fifteen": ("my_levels = shaped_levels(curve=1.3, below=7)[1:]", "how many levels are there"),
        "beyond 1": ("my_levels = 3 * shaped_levels(curve=1.3, below=7)", "Levels should be dense there"),
        "a wrong type": ("my_levels = 'dense near zero'", "how many levels are there"),
        "nothing": ("my_levels = None", "how many levels are there"),
        "the library's own": ("my_levels = ql.codebook('nf4')", "That is the library's own"),
    },
    "07 my_lora": {
        "B @ A formed": ("return x @ (weight + alpha / len(A) * B @ A).t()", "You form `B @ A`"),
        "B @ A formed, and added late": (
            "return x @ weight.t() + alpha / len(A) * (x @ (B @ A).t())",
            "You form `B @ A`",
        ),
        "not divided by r": ("return x @ weight.t() + alpha * (x @ A.t()) @ B.t()", "By what is it divided?"),
        "divided by in": ("return x @ weight.t() + alpha / A.shape[1] * (x @ A.t()) @ B.t()", "Which side of A is r?"),
        "not scaled": ("return x @ weight.t() + x @ A.t() @ B.t()", "The scaling is missing"),
        "without the weight": ("return alpha / len(A) * x @ A.t() @ B.t()", "That is the adapter alone"),
        "a wrong type": ("return (x @ weight.t()).tolist()", "makes a tensor of a list"),
        "shapes that do not fit": ("return x @ weight + x @ A", "shows the line at which it stops"),
        "nothing returned": ("change = (x @ A.t()) @ B.t()", RETURN),
        "the library's own": ("return library(x, weight, B, A, alpha)", "without `LoRALinear`"),
    },
    "07 my_largest_r": {
        "equal is not fewer": ("return out * in_ // (out + in_)", "The question asks for fewer"),
        "the rank of the matrix": ("return min(out, in_)", "the largest rank that the matrix can have"),
        "not whole": ("return out * in_ / (out + in_)", "A rank is a whole number"),
        "a wrong type": ("return str(out)", "without quotation marks"),
        "nothing returned": ("r = out * in_ // (out + in_)", RETURN),
        "the check's own": ("return counting(out, in_)", "without the function that checks it"),
        "the check's own, copied": (
            "some = [r for r in range(1, min(out, in_) + 1) if r * (out + in_) < out * in_]\n"
            "return max(some, default=0)",
            "without the function that checks it",
        ),
    },
    "07 my_sum": {
        "without scalings": ("return torch.cat([B1, B2], 1), torch.cat([A1, A2])", "The scalings are missing"),
        "scalings twice": (
            "return torch.cat([s1 * B1, s2 * B2], 1), torch.cat([s1 * A1, s2 * A2])",
            "once in B, once in A",
        ),
        "the product itself": ("return s1 * B1 @ A1 + s2 * B2 @ A2, torch.eye(32)", "in the same way?"),
        "added": ("return s1 * B1 + s2 * B2, A1 + A2", "in the same way?"),
        "a wrong type": ("return 'B and A'", "with a comma between them"),
        "nothing returned": ("B = torch.cat([s1 * B1, s2 * B2], 1)", NOTHING),
        "the check's own": ("return both(B1, A1, s1, B2, A2, s2)", "in the same way?"),
    },
    "08 my_bytes": {
        "rounded down": (
            "n = out_features * in_features\nb = n // block_size\nreturn n // 2 + b + 4 * (b // 256) + 4",
            "You round down",
        ),
        "constants in float32": (
            "n = out_features * in_features\nreturn -(-n // 2) + 4 * -(-n // block_size)",
            "Your constants are float32",
        ),
        "blocks end with a row": (
            "n = out_features * in_features\nb = out_features * -(-in_features // block_size)\n"
            "return -(-n // 2) + b + 4 * -(-b // 256) + 4",
            "Does a block end with its row?",
        ),
        "no offset": (
            "n = out_features * in_features\nb = -(-n // block_size)\nreturn -(-n // 2) + b + 4 * -(-b // 256)",
            "The offset is missing",
        ),
        "a wrong type": ("return f'{out_features * in_features // 2} bytes'", "without quotation marks"),
        "nothing returned": ("n = out_features * in_features", RETURN),
        "the library's own": ("return stored(out_features, in_features, block_size)", "without `quantize`"),
    },
    "08 my_trained": {
        "one layer": (
            "return 16 * r * sum(m.in_features + m.out_features for m in shape.linears)",
            "You count one layer",
        ),
        "without gradients": (
            "return 12 * r * shape.layers * sum(m.in_features + m.out_features for m in shape.linears)",
            "Three of four",
        ),
        "in bf16": (
            "return 8 * r * shape.layers * sum(m.in_features + m.out_features for m in shape.linears)",
            "how many bytes has a float32?",
        ),
        "adapters alone": (
            "return 4 * r * shape.layers * sum(m.in_features + m.out_features for m in shape.linears)",
            "These are the adapters alone",
        ),
        "a wrong type": ("return shape", TASK),
        "nothing returned": ("layers = shape.layers", RETURN),
        "the library's own": ("return ql.predict_memory(name, r=r).peak", "without `predict_memory`"),
    },
    "08 my_longest": {
        "the first that does not fit": (
            "low, high = 0, 2**20\nwhile high - low > 1:\n    middle = (low + high) // 2\n"
            "    low, high = (middle, high) if peak(name, middle) <= gib * 2**30 else (low, middle)\nreturn high",
            "That length no longer fits",
        ),
        "GB, not GiB": (
            "low, high = 0, 2**20\nwhile high - low > 1:\n    middle = (low + high) // 2\n"
            "    low, high = (middle, high) if peak(name, middle) <= gib * 10**9 else (low, middle)\nreturn low",
            "How many has a GiB?",
        ),
        "a wrong type": ("return [gib]", TASK),
        "nothing returned": ("low, high = 0, 2**20", RETURN),
        "the library's own": ("return ql.fit(name, gib, r=16).longest", "without `fit`"),
    },
    "09 my_faults": {
        "first in, first out": (
            "held, faults = [], []\nfor page in asked:\n    if page not in held:\n        faults.append(page)\n"
            "        held = [*held, page][-frames:]\nreturn faults",
            "Was it the one not used for longest?",
        ),
        "every access": ("return asked", "Does a page that is held fault?"),
        "each page once": ("return list(dict.fromkeys(asked))", "may come back"),
        "their number": ("return 5", "Which pages are they?"),
        "a wrong type": ("return 'pages'", TASK),
        "nothing returned": ("held, faults = [], []", RETURN),
        "the library's own": (
            "return [a.page for a in trace.replay(asked, frames)[0] if a.fault]",
            "without `replay`",
        ),
    },
    "09 my_turns": {
        "steps that do not turn": ("return count if frames < count else 0", "if each step begins at page 0"),
        "two steps": ("return 2 * (count - frames)", "one up and one down"),
        "one too many": ("return count - frames + 1", "One too many"),
        "a wrong type": ("return [count, frames]", TASK),
        "nothing returned": ("faults = count - frames", RETURN),
        "the library's own": ("return turns(count, frames)", "without `replay`"),
    },
    "09 my_rank": {
        "rounded down": ("return 100_000 // side", "You round down"),
        "always one more": ("return 100_000 // side + 1", "includes the number itself"),
        "not whole": ("return 100_000 / side", "A rank is a whole number"),
        "a wrong type": ("return '10'", "without quotation marks"),
        "nothing returned": ("r = 100_000 / side", RETURN),
        "the library's own": ("return smallest(side)", "without `pageable_share`"),
    },
    "10 trainable_at_64": {
        "lora_A alone": ("return 64 * sum(in_ for out, in_ in shapes)", "That is lora_A alone"),
        "lora_B alone": ("return 64 * sum(out for out, in_ in shapes)", "That is lora_B alone"),
        "rank 16": ("return 16 * sum(out + in_ for out, in_ in shapes)", "That is for rank 16"),
        "the sides multiplied": ("return sum(64 * out * in_ for out, in_ in shapes)", "so large a part?"),
        "a wrong type": ("return shapes", TASK),
        "nothing returned": ("total = 64 * sum(out + in_ for out, in_ in shapes)", RETURN),
        "the library's own": (
            "return sum(p.numel() for q in packed[: len(shapes)] "
            "for p in LoRALinear(Linear4bit(q), r=64).parameters())",
            "without `LoRALinear`",
        ),
    },
    "10 bytes_for_the_adapter": {
        "weights alone": ("return 4 * trainable", "Count both"),
        "three of four": ("return 12 * trainable", "Which one is missing?"),
        "a fixed number": ("return 16_000", "how many bytes has a float32?"),
        "a wrong type": ("return f'{16 * trainable} bytes'", "without quotation marks"),
        "nothing returned": ("total = 16 * trainable", RETURN),
        "the check's own": ("return held(trainable)", "without the function that checks it"),
    },
    "11 my_houlsby": {
        "no skip": (
            "return gelu(y @ down.t() + down_bias) @ up.t() + up_bias",
            "has a skip connection of its own",
        ),
        "nothing bent": ("return y + (y @ down.t() + down_bias) @ up.t() + up_bias", "could be folded into the weight"),
        "bent at the end": (
            "return y + gelu((y @ down.t() + down_bias) @ up.t() + up_bias)",
            "You bend at the end",
        ),
        "relu": (
            "return y + torch.relu(y @ down.t() + down_bias) @ up.t() + up_bias",
            "Which function does the formula name?",
        ),
        "no bias down": ("return y + gelu(y @ down.t()) @ up.t() + up_bias", "a bias out on the way down"),
        "no bias up": ("return y + gelu(y @ down.t() + down_bias) @ up.t()", "a bias out on the way up"),
        "an error": ("return y + gelu(y @ down + down_bias) @ up + up_bias", "shows the line at which it stops"),
        "a wrong type": ("return y.tolist()", "makes a tensor of a list"),
        "nothing returned": ("y = y + gelu(y @ down.t() + down_bias) @ up.t() + up_bias", RETURN),
        "the library's own": (
            "layer = houlsby.HoulsbyLinear(torch.nn.Linear(6, 6), 3, torch.Generator())\nreturn layer(y)",
            "without `HoulsbyLinear`",
        ),
        "the check's own": ("return by_library(y, down, down_bias, up, up_bias)", "without `HoulsbyLinear`"),
    },
    "11 my_learned": {
        "q and v alike": ("return layers * size * 4 * d", "Is the output of v as wide as that of q?"),
        "never kv": (
            "return {'lora': layers * size * (3 * d + d // 4), 'prefix': 2 * layers * size * (d // 4),"
            " 'prompt': size * d, 'houlsby': 2 * layers * (2 * size * d + size + d)}[method]",
            "In which of these models is that d / 4?",
        ),
        "one layer": ("return size * (3 * d + kv)", "How many have an adapter?"),
        "one Houlsby adapter a layer": (
            "if method == 'lora': return layers * size * (3 * d + kv)\nreturn layers * (2 * size * d + size + d)",
            "A layer has two parts",
        ),
        "keys alone": (
            "return {'lora': layers * size * (3 * d + kv), 'prefix': layers * size * kv,"
            " 'houlsby': 2 * layers * (2 * size * d + size + d)}.get(method, 0)",
            "What else does attention read?",
        ),
        "a prompt in each layer": (
            "return {'lora': layers * size * (3 * d + kv), 'prefix': 2 * layers * size * kv,"
            " 'houlsby': 2 * layers * (2 * size * d + size + d)}.get(method, layers * size * d)",
            "Does the second one get another?",
        ),
        "a wrong type": ("return str(size)", "without quotation marks"),
        "nothing returned": ("count = size * d", RETURN),
        "the check's own": ("return by_ledger(method, size, d, kv, layers)", "without `predict_memory`"),
    },
    "11 my_attention": {
        "the bug": ("return attend(q, k, v, prefix_k, prefix_v, mask)", "The prefix still changes nothing"),
        "no mask": (
            "k, v = torch.cat([prefix_k, k]), torch.cat([prefix_v, v])\n"
            "return (q @ k.t() / q.shape[-1] ** 0.5).softmax(-1) @ v",
            "also sees what the mask hides",
        ),
        "own causal mask": (
            "k, v = torch.cat([prefix_k, k]), torch.cat([prefix_v, v])\n"
            "mask = torch.ones(len(q), len(k) - len(prefix_k)).tril().bool()\n"
            "mask = pad(mask, (len(prefix_k), 0), value=True)\n"
            "scores = q @ k.t() / q.shape[-1] ** 0.5\n"
            "return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v",
            "a causal mask of your own",
        ),
        "a fixed width": (
            "k, v = torch.cat([prefix_k, k]), torch.cat([prefix_v, v])\n"
            "mask = pad(mask, (len(prefix_k), 0), value=True)\n"
            "return (q @ k.t() / 8**0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v",
            "Is each query 8 wide?",
        ),
        "the new columns at the end": (
            "k, v = torch.cat([prefix_k, k]), torch.cat([prefix_v, v])\n"
            "mask = pad(mask, (0, len(prefix_k)), value=True)\n"
            "scores = q @ k.t() / q.shape[-1] ** 0.5\n"
            "return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v",
            "its new columns at the end",
        ),
        "values behind": (
            "k, v = torch.cat([prefix_k, k]), torch.cat([v, prefix_v])\n"
            "mask = pad(mask, (len(prefix_k), 0), value=True)\n"
            "scores = q @ k.t() / q.shape[-1] ** 0.5\n"
            "return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v",
            "no longer belong together",
        ),
        "a wrong type": ("return q.tolist()", "makes a tensor of a list"),
        "nothing returned": ("mask = pad(mask, (len(prefix_k), 0), value=True)", RETURN),
        "the check's own": (
            "return by_torch(q, k, v, prefix_k, prefix_v, mask)",
            "without the function that checks it",
        ),
    },
    "12 my_elo": {
        "e for 10": (
            "ratings = [1000.0] * systems\nfor first, second, score in results:\n"
            "    gain = 32 * (score - 1 / (1 + math.exp((ratings[second] - ratings[first]) / 400)))\n"
            "    ratings[first] += gain\n    ratings[second] -= gain\nreturn ratings",
            "Which number does the formula raise to a power?",
        ),
        "the difference turned": (
            "ratings = [1000.0] * systems\nfor first, second, score in results:\n"
            "    gain = 32 * (score - 1 / (1 + 10 ** ((ratings[first] - ratings[second]) / 400)))\n"
            "    ratings[first] += gain\n    ratings[second] -= gain\nreturn ratings",
            "the stronger system is expected to lose",
        ),
        "not divided by 400": (
            "ratings = [1000.0] * systems\nfor first, second, score in results:\n"
            "    gain = 32 * (score - 1 / (1 + 10 ** (ratings[second] - ratings[first])))\n"
            "    ratings[first] += gain\n    ratings[second] -= gain\nreturn ratings",
            "By what does the formula divide it?",
        ),
        "always 16 points": (
            "ratings = [1000.0] * systems\nfor first, second, score in results:\n"
            "    ratings[first] += 32 * (score - 0.5)\n    ratings[second] -= 32 * (score - 0.5)\nreturn ratings",
            "Do you use the ratings before *this* game?",
        ),
        "the first alone": (
            "ratings = [1000.0] * systems\nfor first, second, score in results:\n"
            "    ratings[first] += 32 * (score - 1 / (1 + 10 ** ((ratings[second] - ratings[first]) / 400)))\n"
            "return ratings",
            "What does the second system do?",
        ),
        # a win and a loss would hide both of these, so the first case has two wins
        "both gain": (
            "ratings = [1000.0] * systems\nfor first, second, score in results:\n"
            "    gain = 32 * (score - 1 / (1 + 10 ** ((ratings[second] - ratings[first]) / 400)))\n"
            "    ratings[first] += gain\n    ratings[second] += gain\nreturn ratings",
            "What one wins, the other must lose",
        ),
        "the score turned": (
            "ratings = [1000.0] * systems\nfor first, second, score in results:\n"
            "    gain = 32 * (1 - score - 1 / (1 + 10 ** ((ratings[second] - ratings[first]) / 400)))\n"
            "    ratings[first] += gain\n    ratings[second] -= gain\nreturn ratings",
            "Your winner loses points",
        ),
        "without the chance": (
            "ratings = [1000.0] * systems\nfor first, second, score in results:\n"
            "    ratings[first] += 32 * score\n    ratings[second] -= 32 * score\nreturn ratings",
            "You leave the chance out",
        ),
        "a start at 0": (
            "ratings = [0.0] * systems\nfor first, second, score in results:\n"
            "    gain = 32 * (score - 1 / (1 + 10 ** ((ratings[second] - ratings[first]) / 400)))\n"
            "    ratings[first] += gain\n    ratings[second] -= gain\nreturn ratings",
            "Where does everyone start?",
        ),
        "the new rating used": (
            "ratings = [1000.0] * systems\nfor first, second, score in results:\n"
            "    chance = lambda: 1 / (1 + 10 ** ((ratings[second] - ratings[first]) / 400))\n"
            "    ratings[first] += 32 * (score - chance())\n    ratings[second] -= 32 * (score - chance())\n"
            "return ratings",
            "Compute the gain once",
        ),
        "an array": ("return np.full(systems, 1000.0)", "Read the task again"),
        "a wrong type": ("return '1000'", TASK),
        "nothing returned": ("ratings = [1000.0] * systems", RETURN),
        "the library's own": (
            "first, second, score = map(np.array, zip(*results))\n"
            "played = tournament.Scores(first, second, score)\n"
            "return tournament.elo_of_one_order(played, range(len(results)), systems, tournament.Rules())",
            "without `elo_of_one_order`",
        ),
        "the check's own": ("return by_library(results, systems)", "without `elo_of_one_order`"),
    },
    "12 my_interval": {
        "one standard error": (
            "p = right / questions\ne = (p * (1 - p) / questions) ** 0.5\nreturn p - e, p + e",
            "How many hold 95 of 100 exams?",
        ),
        "of one question": (
            "p = right / questions\nd = 1.96 * (p * (1 - p)) ** 0.5\nreturn p - d, p + d",
            "the spread of single questions",
        ),
        "no root": (
            "p = right / questions\nd = 1.96 * p * (1 - p) / questions\nreturn p - d, p + d",
            "A variance, not a standard error",
        ),
        "n outside of the root": (
            "p = right / questions\nd = 1.96 * (p * (1 - p)) ** 0.5 / questions\nreturn p - d, p + d",
            "What falls with the root of n?",
        ),
        "no 1 - p": (
            "p = right / questions\nd = 1.96 * (p / questions) ** 0.5\nreturn p - d, p + d",
            "answered wrong",
        ),
        "in percent": (
            "p = right / questions\nd = 1.96 * (p * (1 - p) / questions) ** 0.5\nreturn 100 * (p - d), 100 * (p + d)",
            "not percentages",
        ),
        "the upper end first": (
            "p = right / questions\nd = 1.96 * (p * (1 - p) / questions) ** 0.5\nreturn p + d, p - d",
            "The lower end comes first",
        ),
        "middle and half": (
            "p = right / questions\nreturn p, 1.96 * (p * (1 - p) / questions) ** 0.5",
            "Return both ends",
        ),
        "questions": (
            "p = right / questions\nd = 1.96 * (p * (1 - p) * questions) ** 0.5\nreturn right - d, right + d",
            "You count questions",
        ),
        "a wrong type": ("return right / questions", "with a comma between them"),
        "nothing returned": ("p = right / questions", RETURN),
        "the check's own": ("return by_scipy(right, questions)", "without the function that checks it"),
    },
    "12 my_percent": {
        "mean of ratios": (
            "r = [100 * a / b for a, b in zip(ours, theirs) if a >= 0]\nreturn sum(r) / len(r)",
            "the mean of the ratios",
        ),
        "unread scores added": ("return 100 * sum(ours) / sum(theirs)", "You add up -1 like a score"),
        "upside down": (
            "return 100 * sum(b for b in theirs if b >= 0) / sum(a for a in ours if a >= 0)",
            "Upside down",
        ),
        "a share": ("return sum(a for a in ours if a >= 0) / sum(b for b in theirs if b >= 0)", "How many percent"),
        "the lead": (
            "return 100 * sum(a for a in ours if a >= 0) / sum(b for b in theirs if b >= 0) - 100",
            "how far it is ahead",
        ),
        "zeros left out": (
            "r = [(a, b) for a, b in zip(ours, theirs) if a > 0]\n"
            "return 100 * sum(a for a, b in r) / sum(b for a, b in r)",
            "0 is a score",
        ),
        "a wrong type": ("return f'{100 * sum(ours) / sum(theirs)} %'", "without quotation marks"),
        "nothing returned": ("total = sum(ours)", RETURN),
        "the library's own": (
            "return replay.relative_score(published.RelativeQuestions('', 3, 17, 16, 149, 104, 86)).percent",
            "without `relative_score`",
        ),
        "the check's own": ("return by_replay(ours, theirs)", "without `relative_score`"),
    },
    "12 my_errata": {
        "not rounded": ("return [n for n in printed if float(printed[n]) != replayed[n]]", "Round first"),
        "those that come out": (
            "return [n for n, t in printed.items() if f'{replayed[n]:.{len(t.partition(\".\")[2])}f}' == t]",
            "Which ones do not?",
        ),
        "a whole point forgiven": (
            "return [n for n in printed if abs(float(printed[n]) - replayed[n]) > 1]",
            "You forgive too much",
        ),
        "half a point forgiven": (
            "return [n for n in printed if abs(float(printed[n]) - replayed[n]) > 0.5]",
            "You forgive too much",
        ),
        # right for 12.3, too strict for 7 and too lax for 9.25
        "half a step of one place": (
            "return [n for n in printed if abs(float(printed[n]) - replayed[n]) > 0.05]",
            "What is half a step",
        ),
        "always one place": (
            "return [n for n in printed if f'{replayed[n]:.1f}' != printed[n]]",
            "How many does its text have?",
        ),
        "whole numbers": (
            "return [n for n in printed if round(float(printed[n])) != round(replayed[n])]",
            "The printed decimal places count, too",
        ),
        "a wrong type": ("return 'c'", TASK),
        "nothing returned": ("print(printed)", RETURN),
        "the check's own": ("return by_rounding(printed, replayed)", "without the function that checks it"),
    },
    "13 my_merge": {
        "without absmax": (
            "return torch.searchsorted(midpoints(levels), levels[codes] + change)",
            "In which unit is the change?",
        ),
        "a whole gap": (
            "up, down = levels.diff()[codes], levels.diff()[codes - 1]\n"
            "return codes + (change > absmax * up).long() - (change < -absmax * down).long()",
            "How far is it to the midpoint?",
        ),
        "upwards only": (
            "return codes + (change > absmax * levels.diff()[codes] / 2).long()",
            "Does a negative change move one down?",
        ),
        "every change": ("return codes + change.sign().long()", "You move each weight"),
        "none": ("return codes", "Your codes are the old ones"),
        "the weights": (
            "landed = torch.searchsorted(absmax * midpoints(levels), absmax * levels[codes] + change)\n"
            "return absmax * levels[landed]",
            "Which codes do they have?",
        ),
        "which ones": (
            "landed = torch.searchsorted(absmax * midpoints(levels), absmax * levels[codes] + change)\n"
            "return landed != codes",
            "Which codes do they move to?",
        ),
        "a wrong type": ("return codes.tolist()", "makes a tensor of a list"),
        "nothing returned": ("edges = absmax * midpoints(levels)", RETURN),
        "the library's own": (
            "sums = torch.cat([torch.tensor([absmax]), absmax * levels[codes] + change])\n"
            "return ql.quantize(sums, levels).codes[1:].long()",
            "without `quantize`",
        ),
        "the check's own": ("return by_library(levels, codes, absmax, change)", "without `quantize`"),
    },
    "13 my_zero": {
        "the other sign": ("return zero + shift / scale", "Does a larger one make a weight larger?"),
        "not in codes": ("return zero - shift", "How large is one step of a code?"),
        "multiplied": ("return zero - shift * scale", "How many steps of `scale`"),
        "the change alone": ("return -shift / scale", "What is it added to?"),
        "the old ones": ("return zero", "Where did the shift go?"),
        "a wrong type": ("return (zero - shift / scale).tolist()", "makes a tensor of a list"),
        "nothing returned": ("new = zero - shift / scale", RETURN),
        "the check's own": ("return for_code_0(scale, zero, shift)", "without the function that checks it"),
    },
    "14 my_picture": {
        "one row": (
            "row = size // patch\nreturn row, 4 * row * layers * kv_heads * head_dim",
            "How many rows has a picture?",
        ),
        "pixels": ("return size**2, 4 * size**2 * layers * kv_heads * head_dim", "not for a pixel"),
        "with the class token": (
            "n = (size // patch) ** 2 + 1\nreturn n, 4 * n * layers * kv_heads * head_dim",
            "leaves the tower's class token out",
        ),
        "keys alone": (
            "n = (size // patch) ** 2\nreturn n, 2 * n * layers * kv_heads * head_dim",
            "Half of it is missing",
        ),
        "one layer": ("n = (size // patch) ** 2\nreturn n, 4 * n * kv_heads * head_dim", "what one layer keeps"),
        "the bytes first": (
            "n = (size // patch) ** 2\nreturn 4 * n * layers * kv_heads * head_dim, n",
            "Return the tokens first",
        ),
        "a wrong type": ("return 'nine'", "with a comma between them"),
        "nothing returned": ("tokens = (size // patch) ** 2", RETURN),
        "the check's own": (
            "return by_cache(size, patch, layers, kv_heads, head_dim)",
            "without the function that checks it",
        ),
    },
    "14 my_saving": {
        "all of 16 bits": (
            "return 100 * counts[part] * (2 - 4.127 / 8) / (2 * sum(counts.values()))",
            "What is it stored in here?",
        ),
        "the weights": ("return 100 * counts[part] / sum(counts.values())", "its share of the weights"),
        "the bytes": (
            "before = sum(n * (4.127 / 8 if name == 'language' else 2) for name, n in counts.items())\n"
            "return 100 * 2 * counts[part] / before",
            "it still takes some of them",
        ),
        "a share": (
            "before = sum(n * (4.127 / 8 if name == 'language' else 2) for name, n in counts.items())\n"
            "return counts[part] * (2 - 4.127 / 8) / before",
            "How many percent is it?",
        ),
        "a wrong type": ("return 'nothing'", "without quotation marks"),
        "nothing returned": ("saved = counts[part]", RETURN),
        "the check's own": ("return by_bytes(counts, part)", "without the function that checks it"),
    },
    "14 my_leak": {
        "the clean ones": (
            "learned = {s[:2] for s in train}\nreturn sorted({s[:2] for s in test} - learned)",
            "Which ones are not?",
        ),
        "whole scenes": (
            "return sorted({s[:2] for s in test if s in train})",
            "You compare whole scenes",
        ),
        "all pairs": ("return sorted({s[:2] for s in train + test})", "Which ones occur in both lists?"),
        "again and again": (
            "learned = {s[:2] for s in train}\nreturn [s[:2] for s in test if s[:2] in learned]",
            "what makes a set, and what sorts it?",
        ),
        "a wrong type": ("return None if train else []", RETURN),
        "nothing returned": ("learned = {s[:2] for s in train}", RETURN),
        "the check's own": ("return by_looking(train, test)", "without the function that checks it"),
    },
    "15 my_floor": {
        "seconds": ("return (weights * bits / 8 + 2 * head) / moved", "How many milliseconds are they?"),
        "the layers alone": ("return 1000 * weights * bits / 8 / moved", "A token passes the head, too"),
        "a packed head": ("return 1000 * (weights + head) * bits / 8 / moved", "The head is not quantised"),
        "bits": ("return 1000 * (weights * bits + 16 * head) / moved", "What does the rate count?"),
        "tokens per second": ("return moved / (weights * bits / 8 + 2 * head)", "How long does one take?"),
        "a wrong type": ("return 'long'", "without quotation marks"),
        "nothing returned": ("read = weights * bits / 8", RETURN),
        "the check's own": ("return by_bits(weights, bits, head, moved)", "without the function that checks it"),
    },
    "15 my_ridge": {
        "not whole": (
            "return weight_bytes / moved / (operations / computed - text_bytes / moved)",
            "Which whole number of texts comes next?",
        ),
        "one too few": (
            "return int(weight_bytes / moved / (operations / computed - text_bytes / moved))",
            "There memory is still the limit",
        ),
        "without the cache": (
            "return math.ceil(weight_bytes / moved * computed / operations)",
            "You leave out the keys and values",
        ),
        "below zero": (
            "return math.ceil(weight_bytes / moved / (operations / computed - text_bytes / moved))",
            "Fewer than no texts",
        ),
        "its size": (
            "return abs(math.ceil(weight_bytes / moved / (operations / computed - text_bytes / moved)))",
            "Do the times ever meet?",
        ),
        "a wrong type": ("return 'many'", "without quotation marks"),
        "nothing returned": ("start = weight_bytes / moved", RETURN),
        "the check's own": (
            "return by_trying(weight_bytes, text_bytes, operations, moved, computed)",
            "without the function that checks it",
        ),
    },
    "15 my_hits": {
        "every guess": (
            "return sum(any(ids[j - n : j] == ids[i - n : i] for j in range(n, i)) for i in range(n, len(ids)))",
            "How often is it right?",
        ),
        "the first place": (
            "same = lambda i: [j for j in range(n, i) if ids[j - n : j] == ids[i - n : i]]\n"
            "return sum(bool(same(i)) and ids[same(i)[0]] == ids[i] for i in range(n, len(ids)))",
            "Take the latest one",
        ),
        "any place": (
            "return sum(ids[i - n : i + 1] in [ids[j - n : j + 1] for j in range(n, i)] for i in range(n, len(ids)))",
            "There is only one guess",
        ),
        "its own place": ("return len(ids) - n", "A guess may look only at what comes before"),
        "a wrong type": ("return 'some'", "without quotation marks"),
        "nothing returned": ("hits = 0", RETURN),
        "the check's own": ("return by_memory(ids, n)", "without the function that checks it"),
    },
}

# what the exercises need of the cells before them, as small as the question allows
BEFORE = {
    "03": 'candidates = [planner.Candidate("nf4", size, False) for size in (32, 64, 128)]',
    "04": """
some = torch.cat([torch.linspace(0.02, 0.2, 256), torch.linspace(0.05, 0.06, 44)])
codes, scale, offset = torch.tensor([3, 250, 127, 0]), torch.tensor(0.5), torch.tensor(0.1)""",
    "05": """
eight = [1, 2, 3, 4, 5, 6, 7, 8]
packed = torch.tensor([0x12, 0x34, 0x56, 0x78])
table = torch.linspace(-1, 1, 256)
scale, offset = torch.tensor([0.5]), torch.tensor(0.25)
n = list(range(1, 4097))
once, again, tile = 41.87, 4.27, 128""",
    "06": """
normal = normal_weights(64 * 64).view(-1, 64)
uses = {"int4": code_use(ql.codebook("int4"), normal)}""",
    "11": """
def attend(q, k, v, prefix_k, prefix_v, mask):
    k, v, mask = torch.cat([prefix_k, k]), torch.cat([prefix_v, v]), pad(mask, (len(prefix_k), 0))
    return (q @ k.t() / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v""",
    "12": "import math",
    "13": 'levels = ql.codebook("nf4")',
    "14": "split = shapes.shapes_split(200, 100)",
    "10": """
import torch
import qlora_lab as ql
from qlora_lab.adapters.lora import LoRALinear
from qlora_lab.model.linear4bit import Linear4bit
packed = [ql.quantize(torch.ones(80, 120)), ql.quantize(torch.ones(200, 80)), ql.quantize(torch.ones(80, 80))]
trainable = 16 * (80 + 120 + 200 + 80 + 160)""",
}


@cache
def cells_of(exercise):
    """The code cells of an exercise, and those of the exercises before it in the same notebook."""
    number, name = exercise.split()
    folder = NOTEBOOKS if number == "10" else NOTEBOOKS / "solutions"
    (path,) = folder.glob(f"{number}_*.ipynb")
    cells = json.loads(path.read_text("utf-8"))["cells"]
    sources = [("".join(cell["source"]), cell["cell_type"]) for cell in cells]
    first = next(i for i, (source, _) in enumerate(sources) if "## Exercises" in source)
    groups = []
    for source, kind in sources[first:]:
        if kind == "markdown" and "**" in source:
            groups.append([])
        elif kind == "code":
            groups[-1].append(source)
    index = next(i for i, group in enumerate(groups) if f'name="{name}"' in "".join(group))
    return groups[index], [source for group in groups[:index] for source in group]


@cache
def namespace(exercise):
    """The names that the exercise finds: those of the imports, of BEFORE, and of the exercises before it."""
    number = exercise.split()[0]
    names = {}
    if number != "10":
        (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
        cells = json.loads(path.read_text("utf-8"))["cells"]
        run(next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"), names)
    run(BEFORE.get(number, ""), names)
    if number == "06":
        run("".join(cells_of(exercise)[1][:1]), names)  # the table of the first exercise
    return names


def run(source, names):
    """Run a cell as IPython does: its lines can be looked up, which Triton does."""
    file = f"<cell {len(linecache.cache)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), names)


def answered(source, answer):
    """A cell with the answer in the place of the right one."""
    if source.startswith("def ") and source.splitlines()[1:2] == ["    return ..."]:  # in notebook 10
        return source.replace("    return ...\n", textwrap.indent(answer, "    ") + "\n")
    if START not in source:
        return source
    before, _, rest = source.partition(START)
    after = rest.partition(END)[2]
    indent = before.rpartition("\n")[2]
    return before + textwrap.indent(answer, indent).removeprefix(indent) + after


def say(exercise, answer, capsys):
    """What the cells of the exercise print; its answer is None where the stored solution stands."""
    number, name = exercise.split()
    if number == "05" and find_spec("triton") is None:
        pytest.skip("Triton exists for Linux")
    if number == "10" and answer is None:
        answer = SOLUTIONS_10[name]
    names = dict(namespace(exercise))
    for source in cells_of(exercise)[0]:
        if "aot." not in source:  # it compiles for minutes; BEFORE has the numbers
            run(source if answer is None else answered(source, answer), names)
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def first_attempt(monkeypatch):
    monkeypatch.setattr(check, "_said", {})


LONG = {"08 my_longest": pytest.mark.long}  # each check searches the longest row three times
EVERY = [pytest.param(exercise, marks=LONG.get(exercise, ())) for exercise in WRONG]
MISTAKES = [
    pytest.param(exercise, mistake, marks=LONG.get(exercise, ()), id=f"{exercise}-{mistake}")
    for exercise, answers in WRONG.items()
    for mistake in answers
]


@pytest.mark.parametrize("exercise", EVERY)
def test_the_right_answer_is_taken_and_the_open_one_is_not(exercise, capsys):
    name = exercise.split()[1]
    assert say(exercise, None, capsys).strip() == f"{name}: correct"


@pytest.mark.parametrize(("exercise", "mistake"), MISTAKES)
def test_a_wrong_answer_gets_the_hint_that_fits(exercise, mistake, capsys):
    answer, hint = WRONG[exercise][mistake]
    said = say(exercise, answer, capsys)
    if hint == OPEN:
        assert said.endswith(f"{hint}\n")
        return
    assert f"{exercise.split()[1]}: not yet. " in said
    assert hint in " ".join(said.partition("Hint: ")[2].split())
    assert say(exercise, answer, capsys) == said  # the same answer, the same hint
    print(said)  # `pytest -rP` shows what students read


ODD = ["None", "...", "'a'", "[]", "{}", "{1}", "object()", "1j", "float('nan')", "10**400", "(1, 2)", "lambda: 1"]
ODD += ["[...]", "[[1], 2]", "True", "b'1'", "range(3)", "NotImplemented", "__import__('torch').zeros(0)"]
ODD += ["__import__('torch').ones(2, device='meta')", "__import__('torch').eye(16).to_sparse()", "1 / 0", "unknown"]


SLOW = {"08 my_longest": pytest.mark.slow}  # as above, for each of the odd values
EXERCISES = [
    pytest.param(exercise, marks=SLOW.get(exercise, ())) for exercise in WRONG if exercise != "05 my_constants"
]


@pytest.mark.parametrize("exercise", EXERCISES)
def test_no_type_ends_in_a_traceback(exercise, capsys):
    name = exercise.split()[1]
    assigned = name in ("my_shifts", "my_levels")  # the others are functions
    for odd in ODD[:-2] if assigned else ODD:
        said = say(exercise, f"{name} = {odd}" if assigned else f"return {odd}", capsys)
        assert (OPEN in said) if odd == "..." else f"{name}: not yet. " in said, odd


def test_every_exercise_has_its_table():
    checked = set()
    for path in NOTEBOOKS.glob("*.ipynb"):
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            checked |= set(re.findall(r'ql\.check\(.*name="(\w+)"', "".join(cell["source"])))
    assert checked == {exercise.split()[1] for exercise in WRONG} == hints.EXERCISES.keys()


@pytest.mark.parametrize("exercise", WRONG)
def test_a_table_has_the_four_kinds_of_wrong_answers(exercise):
    mistakes = list(WRONG[exercise])
    assert len(mistakes) >= 5 and "a wrong type" in mistakes
    assert any(mistake.startswith("nothing") for mistake in mistakes)
    assert any(mistake.startswith(("the library's own", "the check's own", "the codes")) for mistake in mistakes)


@pytest.mark.parametrize("exercise", [exercise for exercise in WRONG if not exercise.startswith("10")])
def test_neither_the_notebook_nor_a_hint_hands_over_the_answer(exercise):
    solution = next(source for source in cells_of(exercise)[0] if START in source)
    region = solution.partition(START)[2].partition(END)[0]
    answer = [line.strip().partition("  #")[0] for line in region.splitlines() if len(line.split()) > 2]
    (path,) = NOTEBOOKS.glob(f"{exercise.split()[0]}_*.ipynb")
    cells = json.loads(path.read_text("utf-8"))["cells"]
    last = next(i for i, cell in enumerate(cells) if "## Exercises" in "".join(cell["source"]))
    in_sight = "".join("".join(cell["source"]) for cell in cells[last:])
    files = (hints, hints_answers, hints_methods, hints_merging, hints_packing, hints_results, hints_seeing)
    sources = "".join(map(inspect.getsource, files))
    in_sight += "\n".join(re.findall(r'"([^"]*)"', sources))
    assert answer and not [line for line in answer if line.removeprefix("return ") in in_sight]


@pytest.mark.parametrize("exercise", EVERY)
def test_hints_know_results_of_every_case_and_none_is_right(exercise, capsys, monkeypatch):
    found = {}

    def recorded(answer, expected, *, name, cases, tolerance=0.0):
        found.update(expected=expected, cases=cases)

    monkeypatch.setattr(ql, "check", recorded)
    say(exercise, None, capsys)
    right = {}
    for case in found["cases"]:
        wanted = found["expected"](*case)
        for place, (wrong, hint) in enumerate(hints.EXERCISES[exercise.split()[1]](*case)):
            assert hint[-1] in ".?"
            right.setdefault((place, hint), []).append(not check._differ(wrong, wanted, 0.0))
    assert right and not [hint for (_, hint), always in right.items() if all(always)]


def test_what_must_not_be_called_exists():
    for exercise, homes in hints.WITHOUT.items():
        assert exercise in hints.EXERCISES
        for home in homes:
            room, file, name = home.split(".", 2)
            assert callable(getattrs(import_module(f"qlora_lab.{room}.{file}"), name)), home


def getattrs(value, path):
    for name in path.split("."):
        value = getattr(value, name)
    return value
