"""What a forward pass keeps for its backward pass, tensor by tensor: the table behind a ledger's activations.

In: a Shape and a Setup. Out: Kept tensors of one layer, and of what comes after the layers.
Source: torch's autograd, read off with saved_tensors_hooks on this library's own layers (measured.py does so
again at any time, and a test compares). Three rules make the table: a product keeps an operand only for the other
one's gradient, so a frozen weight keeps no input; a tensor that two operations keep is there once; and what has no
trained weight before it keeps nothing.

With gradient checkpointing a layer keeps its input, and one layer at a time is computed again.
Not here: weights, and what is needed for a moment (predict.py).
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from qlora_lab.memory.setup import BYTES, Setup
from qlora_lab.memory.shape import LinearShape, Shape

FLOAT32 = 4
# Kinds, as rows of the ledger name them.
NORM, INPUT, ADAPTER = "inputs of norms", "inputs of linear layers", "adapters' inner products"
ATTENTION, MASK, ROTARY = "attention", "attention masks", "rotary cosines and sines"
SWIGLU, CHECKPOINT, INDICES = "SwiGLU", "checkpoints", "indices and scalars"


class Kept(NamedTuple):
    """Elements of one kind that a layer keeps; `formula` in the letters of LETTERS."""

    kind: str
    count: int
    dtype: str
    nbytes: int
    formula: str


LETTERS = "T tokens at once, d hidden, f inner, q queries, kv keys, h heads, r rank, n labels, V vocabulary, L layers"


def targeted(shape: Shape, setup: Setup) -> list[LinearShape]:
    """The linear layers of one layer that have an adapter. Raises ValueError for a name that there is not."""
    if setup.method == "full":
        return []
    names = [one.name for one in shape.linears]
    if setup.targets == "all-linear":
        return list(shape.linears)
    wanted = {setup.targets} if isinstance(setup.targets, str) else set(setup.targets)
    if wanted - set(names) or not wanted:
        raise ValueError(f"targets {sorted(wanted - set(names)) or 'none'}: choose 'all-linear' or from {names}")
    return [one for one in shape.linears if one.name in wanted]


def kept_by_layer(shape: Shape, setup: Setup, first: bool) -> list[Kept]:
    """What one layer keeps; `first`: it is the model's first, whose input has no gradient unless all is trained."""
    return list(_layer(shape, setup, first))


def _layer(shape: Shape, setup: Setup, first: bool) -> Iterator[Kept]:
    T, d, f, q = setup.tokens, shape.hidden, shape.inner, shape.query
    adapted = {one.name: one for one in targeted(shape, setup)}
    full = setup.method == "full"
    flows = full or not first  # whether the input has a gradient; then whatever follows has one
    if flows:
        yield from _norm(setup, d)
    yield from _linears(setup, adapted, ("q_proj", "k_proj", "v_proj"), d, flows)
    flows |= any(name in adapted for name in ("q_proj", "k_proj", "v_proj"))
    if flows:
        yield from _attention(shape, setup)
    # Attention's result is o_proj's input: there already, unless it was computed in another dtype.
    yield from _linears(setup, adapted, ("o_proj",), q, flows, there=flows and not setup.widens)
    flows |= "o_proj" in adapted
    if flows:
        yield from _norm(setup, d)
    yield from _linears(setup, adapted, ("gate_proj", "up_proj"), d, flows)
    gate, up = flows or "gate_proj" in adapted, flows or "up_proj" in adapted
    if gate or up:  # a product keeps an operand for the other one's gradient; silu keeps its input
        yield _kept(SWIGLU, (2 * gate + up) * T * f, setup.dtype, "3 T f: gate, silu(gate), up")
    flows = gate or up
    yield from _linears(setup, adapted, ("down_proj",), f, flows)


def _norm(setup: Setup, d: int) -> Iterator[Kept]:
    """RMSNorm computes in float32: its input, widened, and one over its root mean square a token."""
    T = setup.tokens
    yield _kept(NORM, T * (d + 1), "float32", "T (d + 1)")
    if setup.method == "full":
        yield _kept(NORM, T * d, setup.dtype, "T d: for the gradient of its weight")


def _linears(
    setup: Setup, adapted: dict[str, LinearShape], names: tuple[str, ...], width: int, flows: bool, there: bool = False
) -> Iterator[Kept]:
    """Linear layers that share one input of `width`; `there`: something else keeps that input."""
    T, letter = setup.tokens, {"q_proj": "d", "o_proj": "q", "gate_proj": "d", "down_proj": "f"}[names[0]]
    mine = [adapted[name] for name in names if name in adapted]
    if (mine and not setup.dropout and not there) or (setup.method == "full" and not there):
        yield _kept(INPUT, T * width, setup.dtype, f"T {letter}")
    if setup.dropout and mine:  # each draws its own: what was drawn, and the input with it
        drawn = "bool" if setup.device == "cuda" else setup.dtype
        yield _kept(INPUT, len(mine) * T * width, setup.dtype, f"{len(mine)} T {letter}")
        # the frozen embedding has no gradient to multiply by it
        if flows:
            yield _kept(INPUT, len(mine) * T * width, drawn, f"{len(mine)} T {letter}: dropped or not")
    for one in mine:
        yield _kept(ADAPTER, T * setup.r, "float32" if setup.fused else setup.dtype, "T r")
        if not setup.fused and setup.dtype != setup.adapter_dtype:  # casts of lora_A and lora_B
            yield _kept(ADAPTER, setup.r * (one.out_features + flows * one.in_features), setup.dtype, "r (in + out)")


def _attention(shape: Shape, setup: Setup) -> Iterator[Kept]:
    """torch's fused attention keeps queries, keys, values, its result and one sum a token and head; no scores."""
    T, q, kv = setup.tokens, shape.query, shape.key_value
    dtype = "float32" if setup.widens else setup.dtype
    # With a mask transformers repeats keys and values for each query head, and a single one by a view; without a mask
    # torch repeats them, and keeps none of that.
    keys, letter = (q, "q") if setup.masked and shape.key_value_heads > 1 else (kv, "kv")
    yield _kept(ATTENTION, T * (2 * q + 2 * keys), dtype, f"T (2 q + 2 {letter})")
    yield _kept(ATTENTION, T * shape.heads, "float32", "T h")
    if setup.masked:  # torch turns booleans into numbers to add, anew in each layer
        yield _kept(MASK, T * setup.length, dtype, "T length")


def kept_by_layers(shape: Shape, setup: Setup) -> list[Kept]:
    """What all layers keep, kinds of one dtype added up."""
    if setup.gradient_checkpointing:
        count = shape.layers * setup.tokens * shape.hidden
        return [_kept(CHECKPOINT, count, setup.dtype, f"{shape.layers} x T d")]
    first, other = kept_by_layer(shape, setup, True), kept_by_layer(shape, setup, False)
    sums: dict[tuple[str, str], int] = {}
    words: dict[tuple[str, str], list[str]] = {}
    for times, layer in ((1, first), (shape.layers - 1, other)):
        for one in layer:
            key = one.kind, one.dtype
            sums[key] = sums.get(key, 0) + times * one.count
    for one in other:
        words.setdefault((one.kind, one.dtype), []).append(one.formula)
    return [
        _kept(kind, count, dtype, f"{shape.layers} x ({_joined(words.get((kind, dtype), []))})")
        for (kind, dtype), count in sums.items()
    ]


def _joined(formulas: list[str]) -> str:
    """Each once, with how often it appears."""
    counts = Counter(formulas)
    return " + ".join(one if times == 1 else f"{times} x {one}" for one, times in counts.items())


def kept_after_layers(shape: Shape, setup: Setup) -> list[Kept]:
    """What is kept once: rotary tables, the last norm, the choice of labelled rows."""
    T, d = setup.tokens, shape.hidden
    full = setup.method == "full"
    rotary = 2 * shape.head_dim * (T if setup.packing else setup.length)
    kept = [_kept(ROTARY, rotary, setup.dtype, "2 x head_dim x positions"), *_norm(setup, d)]
    if full:
        kept.append(_kept(INPUT, setup.labels * d, setup.dtype, "n d: the head's"))
    chosen = setup.rows * (setup.length - 1)
    numbers = 8 * setup.labels + 8 * full * T
    return [*kept, Kept(INDICES, chosen + setup.labels + full * T, "bool, int64", chosen + numbers + FLOAT32, "T + n")]


def _kept(kind: str, count: int, dtype: str, formula: str) -> Kept:
    return Kept(kind, count, dtype, count * (1 if dtype == "bool" else BYTES[dtype]), formula)
