"""What a teacher knows about the exercises of the course: the likely mistakes, and what to say about each.

One function for each exercise, under its name and with its arguments. It yields pairs: the result that a mistake leads
to, and the hint for a student who has this result (check.py compares). Its docstring is the hint for any other mistake.
WITHOUT names the functions that would do the exercise, as "room.file.name".

These wrong answers stand here because they would give the right ones away in a notebook.
"""

import inspect

import torch

from qlora_lab.exercises import hints_answers, hints_merging, hints_methods, hints_packing, hints_results, hints_seeing
from qlora_lab.memory.fit import fit
from qlora_lab.memory.shape import shape_of
from qlora_lab.quant.codebook import nearest_codes, normal_float, normal_offset

# ------------------------------------------------------------------------------------------------------ 00 start here


def where(row, column, n_columns):
    """Number the weights row by row, from 0. How many come before this one?"""
    number = row * n_columns + column
    half = "low" if number % 2 else "high"
    swapped = "high" if number % 2 else "low"
    yield (number // 2, swapped), "The byte is right. Which weight of a pair lies in the high half?"
    yield (number, half), "That is the number of the weight. How many weights does a byte hold?"
    yield (number, swapped), "That is the number of the weight. How many weights does a byte hold?"
    yield (column // 2, "low" if column % 2 else "high"), "You look at one row only. How many weights lie above it?"
    yield (half, number // 2), "Return the byte first, then the half."


def bits_per_weight(block_size):
    """A weight pays for its own code and for its part of a constant. How many weights share the constant?"""
    yield 4 + 32, "You charge each weight a whole constant. How many weights share it?"
    yield 32 / block_size, "That is the constant's part alone. The code costs bits, too."
    yield 4, "That is the code alone. The constant costs bits, too."
    yield 4 + 4 / block_size, "You count the constant in bytes. How many bits are four bytes?"
    yield 4 + block_size / 32, "By your formula a larger block makes a weight dearer. Who shares what with whom?"


# -------------------------------------------------------------------------------------------------------- 01 codebook


def my_offset(bits):
    """In 4 bits the two offsets are 1 - 1/30 and 1 - 1/32. What is 30, and what is 32?"""
    more = 1 - 1 / (2 * 2**bits)
    fewer = 1 - 1 / (2 * (2**bits - 1))
    yield (fewer + more) / 2, "Right but for the last digits. How many digits does the rule keep?"
    yield normal_offset(4), "That is the offset for 4 bits. How many slices do `bits` bits make?"
    yield more, "That is one of the two offsets. The rule takes the mean of both."
    yield fewer, "That is one of the two offsets. The rule takes the mean of both."
    yield fewer + more - 1, "You stay a whole slice away from the end. How much does the rule say?"


def my_nf3():
    """Each side goes from the offset to the median, 0.5, without the median. Which steps come after that?"""
    from scipy.stats import norm  # here, because scipy.stats alone takes half a second to import

    levels = normal_float(3)
    yield -levels.flip(0), "The halves are swapped: you have four levels below zero and three above."
    yield normal_float(3, normal_offset(4)), "You took the offset for 4 bits. Three bits have one of their own."
    yield levels * float(norm.ppf(normal_offset(3))), "These are the quantiles. What should the largest level be?"
    for order in (levels.flip(0), levels[[0, 1, 2, 3, 7, 6, 5, 4]], levels[[0, 1, 2, 7, 6, 5, 4, 3]]):
        yield order, "The levels are right, but not in ascending order."


# ------------------------------------------------------------------------------------------------------ 03 block size


def my_block_size(bits, share):
    """What do constants cost a weight at block size 16? At 32? Go on until the rule of thumb holds."""
    sizes = [2**i for i in range(4, 20)]
    exact = 32 / (share * bits)
    right = next(size for size in sizes if size >= exact)
    yield next(size for size in sizes if size > exact), "A size that meets the share exactly is allowed, too."
    yield (
        next((size for size in sizes if 32 / size <= share * (bits + 32 / size)), None),
        "You take a share of all bits. The rule speaks of the bits of the codes alone.",
    )
    yield exact, "The bound is right. Which sizes may a block have?"
    yield right // 2, "One power too small: at this size the constants cost more than their share."
    yield 2 * right, "One power too large: half of it keeps the rule, too."


def my_damage(off, x):
    """An error in a weight counts as much as the square of its input, on average over tokens."""
    squares = off.square()
    yield (squares @ x.square().sum(0)).sum().item(), "You add up over tokens. Do more tokens make more damage?"
    yield (squares @ x.mean(0).square()).sum().item(), "You square the mean of an input. Do +1 and -1 cancel?"
    yield (
        (x @ off.T).square().sum(1).mean().item(),
        "That is the error on just these tokens. In the expected one, products of two inputs are gone.",
    )
    yield squares.sum().item(), "You leave the inputs out. Does an error at a loud input do no more damage?"
    yield (squares @ x.square().mean(0)).mean().item(), "Take the mean over tokens, but add up over outputs."


def my_plan(error, bits, budget):
    """`itertools.product` lists every way. Which of them can you pay for, and which of those is best?"""
    best = [row.index(min(row)) for row in error]
    yield best, "Each layer has its best candidate. What do they cost together?"
    yield [row.index(min(row)) for row in bits], "That is the cheapest plan. Is there budget left to lower the error?"
    part = budget / len(bits)
    affordable = [[c for c, cost in enumerate(row) if cost <= part] for row in bits]
    alone = [min(some, key=row.__getitem__, default=0) for some, row in zip(affordable, error, strict=True)]
    yield alone, "You give each layer an equal part of the budget. Can one layer spend what another saves?"


# ---------------------------------------------------------------------------------------------------- 04 double quant


def my_bits(block_size, group_size):
    """How many weights share a constant of 8 bits, and how many share a scale of 32?"""
    constants = 8 / block_size
    scales = 32 / (block_size * group_size)
    yield constants, "The scales are missing. They are few, but they cost bits."
    yield constants + 32 / group_size, "A scale serves a group of blocks. How many weights are that?"
    yield 4 + constants + scales, "The question is about constants alone. You add the bits of the codes."
    yield 32 / block_size, "These are constants in float32. How many bits has one after double quantization?"
    yield constants + 8 / (block_size * group_size), "A scale is a float32 and not rounded again."


def my_absmax(codes, scale, offset):
    """What did double quantization do, step by step? Undo the last step first."""
    values = _map().sort().values[codes.int()]
    groups = scale.repeat_interleave(256)[: len(codes)]
    yield values * groups, "Something was subtracted before the constants were rounded. Where does it come back?"
    yield values * groups - offset, "The offset was subtracted. To undo that, which sign?"
    yield values * scale[0] + offset, "You use the first scale for all. With which constant does the next group begin?"
    yield values * scale.repeat(256)[: len(codes)] + offset, "Print `scale.repeat(3)`: are neighbours equal?"
    yield codes * groups + offset, "A code is an index, not a value. Into which table?"
    yield (values + offset) * groups, "What was done first: subtract the mean, or divide by the scale?"


def my_map():
    """Work out decade 1 by hand: where does it begin, where does it end, and how many levels has it?"""
    ascending = "The levels are right, but not in ascending order."
    yield _map(), ascending
    yield _map().sort(descending=True).values, ascending
    for edges in (slice(1, None), slice(None, -1)):
        yield _map(edges=edges).sort().values, "You take an edge of each step. Which point of it is the level?"
    yield _map(end=10.0**-7).sort().values, "Your decades lie too low by a factor of ten. Where does decade 6 end?"
    yield _map(end=10.0**-5).sort().values, "Your decades lie too high by a factor of ten. Where does decade 6 end?"


def _map(end=10.0**-6, edges=None):
    """Return the dynamic map, not sorted, with decade 0 up to `end`, and edges of steps instead of their middles."""
    steps = [torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32) for i in range(7)]
    places = [step[edges] if edges else (step[:-1] + step[1:]) / 2 for step in steps]
    up = torch.cat([10.0**i * end * place for i, place in enumerate(places)])
    return torch.cat([-up, torch.tensor([0.0, 1.0], dtype=torch.float32), up])


# --------------------------------------------------------------------------------------------------------- 05 kernels


def my_shifts(word):
    """Byte 1 of a word begins at bit 8. Which two shifts reach its halves, and which half comes first?"""
    yield [word >> s & 15 for s in range(0, 32, 4)], "In each byte the halves are swapped. Which one comes first?"
    yield [word >> s & 15 for s in range(28, -4, -4)], "You begin with the last byte. Where does the first one lie?"
    yield [word >> s & 15 for s in range(8)], "You move on by one bit. How many bits has a code?"


def my_constants(codes, scale, offset, table):
    """`tl.arange(0, LANES)` are the places, and a pointer plus the places points to each. What is loaded first?"""
    n = len(codes)
    values = table[torch.cat([codes, codes.new_zeros(8 - n)]).int()]
    behind = torch.arange(8) >= n
    yield values * scale + offset, "You write behind `n`. The load has a mask: what about the store?"
    yield (values * scale).where(~behind, -1.0), "The offset is missing."
    yield (values + offset).where(~behind, -1.0), "The scale is missing."
    yield values.where(~behind, -1.0), "These are the values of the table. What became of scale and offset?"
    padded = torch.cat([codes, codes.new_zeros(8 - n)])
    yield (padded * scale + offset).where(~behind, -1.0), "You use the code as a value. What is it an index of?"


def my_tokens(once, again, tile):
    """How often may a weight be decoded before that costs more than once? How many tokens is that?"""
    tiles = int(once // again)
    yield tiles * tile, "These tokens still pay. With which one does it stop?"
    yield tiles, "That is a number of tiles. How many tokens are in one?"
    yield tiles + 1, "That is a number of tiles. How many tokens are in one?"
    yield (tiles + 1) * tile, "One tile too far: does its first token cost less than the whole tile?"
    for tokens in (int(once / again * tile), int(once / again * tile) + 1):
        yield tokens, "Part of a tile costs as much as all of it."


# ------------------------------------------------------------------------------------------------------ 06 data types


def first_wrong(weights, levels, codes):
    """Which two levels does each weight lie between, once it is scaled, and which of them is nearer?"""
    wrong = _wrong(weights / weights.abs().max(), levels, codes)
    raw = _wrong(weights, levels, codes)
    signed = _wrong(weights / weights.max(), levels, codes)
    yield next(iter(raw), None), "You compare the weights as they are. Which step comes before?"
    yield next(iter(signed), None), "You divide by the largest weight. Can a negative one have the larger magnitude?"
    yield wrong[0] + 1, "You count from 1. From where does an index count?"
    yield wrong[-1], "That is the last wrong code. The question is about the first."
    yield wrong, "These are all wrong codes. The question is about the first."


def _wrong(scaled, levels, codes):
    return (nearest_codes(scaled, levels) != torch.tensor(codes, dtype=torch.int64)).nonzero().flatten().tolist()


def my_block(weights, levels):
    """absmax, nearest level, times absmax: print these three steps for the four weights of the second case."""
    absmax = weights.abs().max().clamp(min=1e-38)
    codes = nearest_codes(weights / absmax, levels)
    signed = weights.max().clamp(min=1e-38)
    largest = "You divide by the largest weight. Can a negative one have the larger magnitude?"
    yield levels[nearest_codes(weights / signed, levels).long()] * signed, largest
    yield levels[codes.long()], "These are the levels. The weights had another size."
    yield levels[nearest_codes(weights, levels).long()], "Levels lie in [-1, 1]. Do the weights, before you scale them?"
    for kind in (codes, codes.int(), codes.long()):
        yield kind, "These are codes. Which level does each stand for, and what was it divided by?"
    yield torch.full_like(weights, torch.nan), "0 / 0 is NaN, and a block of zeros asks for it."


def my_levels(levels):
    """Where are most of the weights? Levels should be dense there. Move one slider at a time."""
    yield "not sixteen levels, one of them 0", "Print `my_levels`: how many levels are there, and where is zero?"
    yield "NF4 itself", "That is the library's own. Shape one of yours, and see how near you come."


# ------------------------------------------------------------------------------------------------------------ 07 lora


def my_lora(x, weight, B, A, alpha):
    """Follow the shapes: x is (tokens, in). What is `x @ A.t()`, and how does it become (tokens, out)?"""
    base = x @ weight.t()
    change = (x @ A.t()) @ B.t()
    scaling = alpha / len(A)
    yield (
        x @ (weight + scaling * (B @ A)).t(),
        "You form `B @ A`: as large as the weight, and here too large for float32. With which product can x begin?",
    )
    yield base + alpha * change, "You scale by alpha. By what is it divided?"
    yield base + change, "The scaling is missing."
    yield base + alpha / A.shape[1] * change, "You divide alpha by the number of inputs. Which side of A is r?"
    yield scaling * change, "That is the adapter alone. Does the frozen weight no longer take part?"
    yield scaling * (base + change), "You scale the frozen weight as well. To what does the scaling belong?"


def my_largest_r(out, in_):
    """How many numbers do A and B have together at rank r? Write down when that is fewer than `out * in_`."""
    equal = out * in_ // (out + in_)
    right = (out * in_ - 1) // (out + in_)
    yield equal, "At this r both have the same number. The question asks for fewer."
    yield right + 1, "At this r LoRA no longer has fewer."
    yield right - 1, "One more rank would still have fewer."
    yield min(out, in_), "That is the largest rank that the matrix can have. How many numbers has LoRA there?"
    yield out * in_ / (out + in_), "A rank is a whole number."


def my_sum(B1, A1, s1, B2, A2, s2):
    """B @ A is a sum, a column times a row for each rank. How do you write a longer sum in the same way?"""
    shapes = (len(B1), B1.shape[1] + B2.shape[1]), (A1.shape[0] + A2.shape[0], A1.shape[1])
    yield (*shapes, B1 @ A1 + B2 @ A2), "The scalings are missing."
    yield (*shapes, s1**2 * B1 @ A1 + s2**2 * B2 @ A2), "The scalings are in twice: once in B, once in A."
    yield (*shapes, s2 * B1 @ A1 + s1 * B2 @ A2), "The scalings are exchanged."


# ---------------------------------------------------------------------------------------------------------- 08 memory


def my_bytes(out_features, in_features, block_size):
    """How many bytes do the codes need, how many blocks are there, and how many groups of 256 blocks?"""
    weights = out_features * in_features
    blocks = _ceil(weights, block_size)
    right = _ceil(weights, 2) + blocks + 4 * _ceil(blocks, 256) + 4
    down = weights // 2 + weights // block_size + 4 * (weights // block_size // 256) + 4
    yield down, "You round down. Is a partial byte, block or group not stored?"
    yield right - 4, "The offset is missing."
    yield _ceil(weights, 2) + 4 * blocks, "Your constants are float32. What does double quantization store of them?"
    yield right + weights - _ceil(weights, 2), "You give each code a byte. How many fit in one?"
    by_row = out_features * _ceil(in_features, block_size)
    yield right + by_row - blocks + 4 * (_ceil(by_row, 256) - _ceil(blocks, 256)), "Does a block end with its row?"


def _ceil(a, b):
    return -(-a // b)


def my_trained(name, r):
    """lora_A is r x in, lora_B is out x r. How many numbers does training hold for each of theirs?"""
    shape = shape_of(name)
    layer = r * sum(matrix.in_features + matrix.out_features for matrix in shape.linears)
    yield 16 * layer, "You count one layer. Where does `shape` say how many there are?"
    yield 12 * layer * shape.layers, "Three of four: is it the gradients that are missing, or one of the two moments?"
    yield 8 * layer * shape.layers, "What does AdamW keep for each number? And how many bytes has a float32?"
    yield 4 * layer * shape.layers, "These are the adapters alone, or numbers instead of bytes."
    yield (
        layer * shape.layers,
        "That is a count of numbers in the adapters. What belongs to each, and in how many bytes?",
    )


def my_longest(name, gib):
    """A longer row never needs less memory. Ask the middle: in which half does the answer lie?"""
    yield _longest(name, gib) + 1, "That length no longer fits."
    yield _longest(name, gib) - 1, "One token more still fits."
    yield _longest(name, gib * 10**9 / 2**30), "You count 10**9 bytes. How many has a GiB?"


def _longest(name, gib):
    answer = fit(name, gib, length=1, r=16, batch_size=1, gradient_checkpointing=True)
    return answer.longest if answer.fits and not answer.switched else 0


# ------------------------------------------------------------------------------------------------- 09 paged optimizer


def my_faults(asked, frames):
    """Keep a list of the pages that are held, the least recently used first. What does each access change in it?"""
    yield _faults(asked, frames, moved=False), "The page that came first leaves. Was it the one not used for longest?"
    yield list(asked), "You count every access. Does a page that is held fault?"
    yield list(dict.fromkeys(asked)), "A page that had to leave may come back. What happens then?"
    yield _faults(asked, frames + 1), "You hold one page more than there are frames."
    yield len(_faults(asked, frames)), "That is their number. Which pages are they?"


def _faults(asked, frames, moved=True):
    held = []
    faults = []
    for page in asked:
        if page not in held:
            faults.append(page)
            held.append(page)
        elif moved:
            held.remove(page)
            held.append(page)
        held = held[-frames:]
    return faults


def my_turns(count, frames):
    """Try 4 pages and 3 frames: which pages are held when a step begins, and which does it ask for first?"""
    fixed = count if frames < count else 0
    yield fixed, "That holds if each step begins at page 0. With which pages does this one begin?"
    yield 2 * (count - frames), "That is for two steps, one up and one down."
    yield count - frames + 1, "One too many. Is a page that is held when the step begins gone before its turn?"
    yield frames, "That is how many pages are held. Which ones have to be fetched?"


def my_rank(side):
    """At least 100,000 elements: how many has the tensor at your answer, and how many at one rank less?"""
    yield 100_000 // side, "You round down. How many elements has the tensor at this rank?"
    yield 100_000 // side + 1, "Is a rank less not enough? 'At least' includes the number itself."
    yield 100_000 / side, "A rank is a whole number."


# --------------------------------------------------------------------------------------------------- 10 finetune llama


def trainable_at_64(shapes):
    """Which shapes have lora_A and lora_B beside a matrix (out, in)?"""
    yield sum(64 * in_ for _, in_ in shapes), "That is lora_A alone."
    yield sum(64 * out for out, _ in shapes), "That is lora_B alone."
    yield sum(16 * (out + in_) for out, in_ in shapes), "That is for rank 16."
    yield sum(64 * out * in_ for out, in_ in shapes), "You multiply the sides of the matrix. Has LoRA so large a part?"


def bytes_for_the_adapter(trainable):
    """Which numbers belong to one trainable weight, and how many bytes has a float32?"""
    yield 4 * trainable, "You have one number of four bytes for each weight, or four of one byte. Count both."
    yield 8 * trainable, "You have two numbers for each weight. Which others does training hold?"
    yield 12 * trainable, "You have three numbers for each weight. Which one is missing?"


_ALL = vars(hints_packing) | vars(hints_methods) | vars(hints_results) | vars(hints_merging)
_ALL |= vars(hints_seeing) | vars(hints_answers) | globals()
EXERCISES = {name: value for name, value in _ALL.items() if inspect.isgeneratorfunction(value)}
_QUANTIZE = ("quant.quantize.quantize", "quant.quantize.quantize_blocks")
_LORA = ("adapters.lora_linear.LoRALinear.__init__", "adapters.lora_linear.LoRALinear.forward")
WITHOUT = hints_packing.WITHOUT | hints_methods.WITHOUT | hints_results.WITHOUT | hints_merging.WITHOUT
WITHOUT |= hints_seeing.WITHOUT | hints_answers.WITHOUT
WITHOUT |= dict.fromkeys(("where", "bits_per_weight", "my_block_size", "first_wrong", "my_bytes"), _QUANTIZE)
WITHOUT |= {
    "my_offset": ("quant.codebook.normal_offset",),
    "my_nf3": ("quant.codebook.codebook", "quant.codebook.normal_float"),
    "my_plan": ("measure.best_plan.best_plan",),
    "my_bits": ("memory.published.constant_bits",),
    "my_absmax": ("quant.double_quant.double_dequantize",),
    "my_map": ("quant.double_quant.dynamic_map",),
    "my_tokens": ("gpu_code.roofline.stops_paying",),
    "my_block": (*_QUANTIZE, "quant.quantize.dequantize"),
    "my_lora": _LORA,
    "my_trained": ("memory.predict.predict_memory",),
    "my_longest": ("memory.fit.fit",),
    "my_faults": ("memory.paging_trace.replay",),
    "my_turns": ("memory.paging_trace.replay",),
    "my_rank": ("memory.paging_trace.pageable_share",),
    "trainable_at_64": _LORA,
}
