"""Predict, tensor by tensor, the activations that a forward pass keeps for its backward pass.

Source: torch's autograd, observed with saved_tensors_hooks on this library's own layers (measured.py repeats that on
any model, and a test compares). Three rules make the table: a product keeps an operand only for the gradient of the
other, so a frozen weight keeps no input; a tensor that two operations keep is stored once; an operation without a
trained weight before it keeps nothing.

With gradient checkpointing a layer keeps only its input, and the backward pass computes one layer at a time again.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from qlora_lab.memory.learned import biased
from qlora_lab.memory.linear_shape import LinearShape
from qlora_lab.memory.setup import BYTES, Setup
from qlora_lab.memory.shape import Shape
from qlora_lab.memory.sight import HEAD, PROJECTOR
from qlora_lab.memory.targets import targeted

FLOAT32 = 4
# The kinds of activations: the names of their rows in the ledger.
NORM, INPUT, ADAPTER = "inputs of norms", "inputs of linear layers", "adapters' inner products"
ATTENTION, MASK, ROTARY = "attention", "attention masks", "rotary cosines and sines"
ROUTING, EXPERT_ACTIVATIONS = "routing", "activations of experts"
TURNED = "outputs that DoRA turns"
SWIGLU, CHECKPOINT, INDICES = "SwiGLU", "checkpoints", "indices and scalars"


class Kept(NamedTuple):
    """The elements of one kind that a layer keeps."""

    kind: str  # NORM, INPUT, ...
    count: int  # elements
    dtype: str
    nbytes: int
    formula: str  # in the letters of LETTERS


LETTERS = "T tokens at once, d hidden, f inner, q queries, kv keys, h heads, r rank, n labels, V vocabulary, L layers"
LETTERS += ", m bottleneck, p virtual tokens, E experts, k of a token, s inner of a shared expert"
Width = tuple[int, str]  # features of an input, and their letter
SIZES = BYTES | {"bool": 1, "int32": 4, "int64": 8}


def kept_by_layer(shape: Shape, setup: Setup, first: bool) -> Iterator[Kept]:
    """Yield what one layer keeps. first: the model's first, whose input has a gradient only in full training."""
    adapted = {linear.name: linear for linear in targeted(shape, setup).linears}
    biases = {linear.name for linear in biased(shape, setup)}
    # Whether a gradient flows to this point. It starts at the first trained weight; from there on it never stops.
    flows = setup.method in ("full", "prompt") or not first
    if flows:
        yield from _norm(setup, shape.hidden)
    yield from _linears(setup, adapted, ("q_proj", "k_proj", "v_proj"), (shape.hidden, "d"), flows)
    for name, width, heads in shape.inner_norms:
        if flows or name in {*adapted, *biases}:
            yield from _norm(setup, width, heads, f" of {'each head' if shape.head_norms else 'all heads'}")
    flows |= setup.method == "prefix" or not {"q_proj", "k_proj", "v_proj"}.isdisjoint({*adapted, *biases})
    if flows:
        yield from _attention(shape, setup)
    # Attention has kept its result, which is o_proj's input, unless a cast to another dtype stands between them.
    yield from _linears(setup, adapted, ("o_proj",), (shape.query, "q"), flows, stored=flows and not setup.widens)
    flows |= "o_proj" in {*adapted, *biases}
    if setup.method == "houlsby":
        yield from _bottleneck(setup, shape.hidden, flows)
        flows = True
    if flows:
        yield from _norm(setup, shape.hidden)
    if shape.experts:
        yield from _shared(shape, setup, adapted, biases, flows)
        yield from _routed(shape, setup, flows)
    else:
        yield from _dense(shape, (shape.inner, "f"), setup, adapted, biases, flows)
    if setup.method == "houlsby":
        yield from _bottleneck(setup, shape.hidden, flows=True)


def _dense(
    shape: Shape, inner: Width, setup: Setup, adapted: dict[str, LinearShape], biases: set[str], flows: bool
) -> Iterator[Kept]:
    """The MLP of a model without experts, or a shared expert."""
    T = setup.tokens
    f, letter = inner
    yield from _linears(setup, adapted, ("gate_proj", "up_proj"), (shape.hidden, "d"), flows)
    gate = flows or "gate_proj" in {*adapted, *biases}
    up = flows or "up_proj" in {*adapted, *biases}
    if gate or up:  # silu(gate) * up keeps each factor for the gradient of the other; silu keeps its input
        yield _kept(SWIGLU, (2 * gate + up) * T * f, setup.dtype, f"3 T {letter}: gate, silu(gate), up")
    flows = gate or up
    yield from _linears(setup, adapted, ("down_proj",), inner, flows)


def _shared(
    shape: Shape, setup: Setup, adapted: dict[str, LinearShape], biases: set[str], flows: bool
) -> Iterator[Kept]:
    """An expert that all tokens pass. A gate weighs its answer: each of the two serves the other's gradient."""
    if not shape.shared:
        return
    T = setup.tokens
    yield from _dense(shape, (shape.shared, "s"), setup, adapted, biases, flows)
    if flows or not {"gate_proj", "up_proj", "down_proj"}.isdisjoint({*adapted, *biases}):
        yield _kept(ROUTING, T, setup.dtype, "T: the shared expert's gate")
    if flows:  # without a gradient for the gate, its answer is not needed
        yield _kept(ROUTING, T * shape.hidden, setup.dtype, "T d: its answer")


def _routed(shape: Shape, setup: Setup, flows: bool) -> Iterator[Kept]:
    """A router and its experts: T k pairs of token and expert, however they are spread over the experts."""
    T = setup.tokens
    pairs = T * shape.experts_per_token
    adapted = [matrix.name for matrix in targeted(shape, setup).experts]
    if flows:  # a frozen router passes the gradient on, as every layer does: softmax keeps all shares, in float32
        yield _kept(ROUTING, T * shape.experts, "float32", "T E: shares")
        if shape.normalised:
            yield _kept(ROUTING, pairs + T, "float32", "T (k + 1): the chosen and their sum")
        if setup.whole and not shape.shared:  # a shared expert keeps the same tensor
            yield _kept(ROUTING, T * shape.hidden, setup.dtype, "T d: its input")
        yield _kept(ROUTING, 3 * pairs, "int64", "3 T k: the chosen, tokens by expert, there")
    if not flows and not adapted:
        return
    # Mixtral multiplies 16-bit answers by float32 weights, Qwen3 rounds the weights first
    wide = "float32" if shape.family == "mixtral" else setup.dtype
    yield _kept(ROUTING, pairs, wide, "T k: weights")
    yield _kept(ROUTING, pairs, "int64", "T k: from pairs back to tokens")
    if not setup.is_packed and not adapted:  # torch's own grouped product
        yield _kept(ROUTING, shape.experts, "int32", "E: ends of groups")
    yield from _expert(shape, setup, flows)


def _expert(shape: Shape, setup: Setup, flows: bool) -> Iterator[Kept]:
    """What all experts keep between them, adapters included. flows: whether their input has a gradient."""
    pairs = setup.tokens * shape.experts_per_token
    d, f = shape.hidden, shape.inner
    adapted = {matrix.name: matrix for matrix in targeted(shape, setup).experts}
    inner_flows = flows or "gate_up_proj" in adapted
    if inner_flows:
        yield _kept(EXPERT_ACTIVATIONS, 3 * pairs * f, setup.dtype, "3 T k f: gate, silu(gate), up")
    if flows:  # an answer serves the gradient of its weight, which a router without one does not ask for
        yield _kept(EXPERT_ACTIVATIONS, pairs * d, setup.dtype, "T k d: answers")
    if setup.whole:
        yield _kept(EXPERT_ACTIVATIONS, pairs * (d + f), setup.dtype, "T k (d + f): inputs of their products")
    for matrix in adapted.values():
        letter = "f" if matrix.name == "down_proj" else "d"
        yield _kept(EXPERT_ACTIVATIONS, pairs * matrix.in_features, setup.dtype, f"T k {letter}: inputs")
        inner_dtype = "float32" if setup.fused else setup.dtype
        yield _kept(EXPERT_ACTIVATIONS, pairs * setup.r, inner_dtype, "T k r: inner products")
        if not setup.fused and setup.dtype != setup.adapter_dtype:
            # Only experts with tokens cast their pair. How many is not known: all, if there are tokens enough.
            used = min(shape.experts, pairs)
            width = matrix.out_features + (inner_flows if letter == "f" else flows) * matrix.in_features
            yield _kept(EXPERT_ACTIVATIONS, used * setup.r * width, setup.dtype, "E r (in + out): casts")


def _bottleneck(setup: Setup, d: int, flows: bool) -> Iterator[Kept]:
    """A Houlsby adapter keeps its input, the input and the output of its gelu, and the casts of its two matrices."""
    T = setup.tokens
    yield _kept(ADAPTER, T * (d + 2 * setup.size), setup.dtype, "T (d + 2 m)")
    if setup.dtype != setup.adapter_dtype:  # that of `down` serves the gradient of the input
        yield _kept(ADAPTER, (1 + flows) * setup.size * d, setup.dtype, "2 m d")


def _norm(setup: Setup, d: int, heads: int = 1, each: str = "") -> Iterator[Kept]:
    """RMSNorm computes in float32: it keeps its widened input, and one reciprocal root mean square per token.

    heads: each has its own weights, d wide; `each` says so in the formula.
    """
    rows = setup.tokens * heads
    yield _kept(NORM, rows * (d + 1), "float32", f"T (d + 1){each}")
    if setup.whole:
        yield _kept(NORM, rows * d, setup.dtype, f"T d: for the gradient of its weight{each}")


def _linears(
    setup: Setup,
    adapted: dict[str, LinearShape],
    names: tuple[str, ...],
    read: Width,
    flows: bool,
    stored: bool = False,
) -> Iterator[Kept]:
    """Linear layers that share one input. stored: another operation keeps that input already."""
    T = setup.tokens
    width, letter = read
    mine = [adapted[name] for name in names if name in adapted]
    if (mine and not setup.dropout and not stored) or (setup.whole and not stored):
        yield _kept(INPUT, T * width, setup.dtype, f"T {letter}")
    if setup.dropout and mine:  # each adapter drops elements of its own: it keeps its input and its mask
        drawn = "bool" if setup.device == "cuda" else setup.dtype  # CUDA's fused dropout keeps booleans
        yield _kept(INPUT, len(mine) * T * width, setup.dtype, f"{len(mine)} T {letter}")
        if flows:  # the mask serves only the gradient of the input, which the first layer does not have
            yield _kept(INPUT, len(mine) * T * width, drawn, f"{len(mine)} T {letter}: dropped or not")
    for linear in mine:
        yield from _product(linear, setup, flows)


def _product(linear: LinearShape, setup: Setup, flows: bool) -> Iterator[Kept]:
    """What LoRA or a relative keeps beside a layer's input."""
    T = setup.tokens
    pissa = setup.method == "pissa"
    r, letter = (2 * setup.r, "2 r") if pissa else (setup.r, "r")  # PiSSA multiplies with A and A0
    yield _kept(ADAPTER, T * r, "float32" if setup.fused else setup.dtype, f"T {letter}")
    # A matrix is kept if it is made for the product: a cast of lora_A or lora_B, or PiSSA's, of both.
    cast = not setup.fused and setup.dtype != setup.adapter_dtype
    if cast or pissa:
        width = linear.out_features + (flows or setup.fused) * linear.in_features
        yield _kept(ADAPTER, r * width, setup.dtype if cast else setup.adapter_dtype, f"{letter} (in + out)")
    if setup.method == "dora":
        out = linear.out_features
        yield _kept(TURNED, T * out, setup.dtype, "T out")
        yield _kept(TURNED, 2 * out, "float32", "2 out: factors and lengths")
        yield _kept(TURNED, out, "bool", "out")


def _attention(shape: Shape, setup: Setup) -> Iterator[Kept]:
    """torch's fused attention keeps queries, keys, values, its result and one sum per token and head, but no scores."""
    T = setup.tokens
    q = shape.query
    kv = shape.key_value
    dtype = "float32" if setup.widens else setup.dtype
    # With a mask, transformers copies keys and values to each query head; a single head needs only a view. Without a
    # mask torch repeats them itself and keeps no copy. Our kernel for pairs of bf16 reads the booleans and needs none.
    masked = setup.masked and not (setup.pairs and shape.head_dim % 32 == 0)
    keys, letter = (q, "q") if masked and shape.key_value_heads > 1 else (kv, "kv")
    count = 2 * T * q + 2 * setup.rows * setup.key_length * keys
    yield _kept(ATTENTION, count, dtype, f"T (2 q + 2 {letter})" + f" + p x 2 {letter}" * (setup.method == "prefix"))
    yield _kept(ATTENTION, T * shape.heads, "float32", "T h")
    if masked:  # torch turns the booleans into numbers to add, again in each layer
        yield _kept(MASK, T * setup.key_length, dtype, "T length")  # (rows, 1, length, keys)


def kept_by_layers(shape: Shape, setup: Setup) -> list[Kept]:
    """Return what all layers keep, summed by kind and dtype."""
    if setup.gradient_checkpointing:
        count = shape.layers * setup.tokens * shape.hidden
        return [_kept(CHECKPOINT, count, setup.dtype, f"{shape.layers} x T d")]
    sums = Counter()  # elements by kind and dtype
    formulas = defaultdict(list)  # of each layer but the first
    for kept in kept_by_layer(shape, setup, first=True):
        sums[kept.kind, kept.dtype] += kept.count
    for kept in kept_by_layer(shape, setup, first=False):
        sums[kept.kind, kept.dtype] += (shape.layers - 1) * kept.count
        formulas[kept.kind, kept.dtype].append(kept.formula)
    words = {key: f"{shape.layers} x ({_joined(formulas[key])})" for key in sums}
    return [_kept(kind, count, dtype, words[kind, dtype]) for (kind, dtype), count in sums.items()]


def _joined(formulas: list[str]) -> str:
    """Name each formula once, with its number of appearances."""
    counts = Counter(formulas)
    return " + ".join(formula if times == 1 else f"{times} x {formula}" for formula, times in counts.items())


def kept_after_layers(shape: Shape, setup: Setup) -> list[Kept]:
    """Return what the model keeps once: rotary tables, the last norm, the indices of labelled rows."""
    T = setup.tokens
    d = shape.hidden
    full = setup.whole
    # cosines and sines: for each token if its position is its own (packing), else for one row
    rotary = 2 * shape.head_dim * (T if setup.packing else setup.read_length)
    kept = [_kept(ROTARY, rotary, setup.dtype, "2 x head_dim x positions"), *_norm(setup, d)]
    kept += _seen(shape, setup)
    if full and (shape.tied or setup.learns(HEAD)):
        kept.append(_kept(INPUT, setup.labels * d, setup.dtype, "n d: the head's"))
    if setup.method == "prefix" and setup.mlp is not None:
        kept.append(_kept(ADAPTER, setup.virtual_tokens * setup.mlp, "float32", "p x the MLP's width"))
    chosen = setup.rows * (setup.length - 1)  # booleans: has this next token a label?
    numbers = 8 * setup.labels + 8 * full * T  # int64: labels, and token ids for the gradient of the embeddings
    return [*kept, Kept(INDICES, chosen + setup.labels + full * T, "bool, int64", chosen + numbers + FLOAT32, "T + n")]


def _seen(shape: Shape, setup: Setup) -> Iterator[Kept]:
    """What the way of pictures into the language model keeps; a frozen tower and projector keep nothing."""
    projects = setup.learns(PROJECTOR)
    pictures = setup.rows * setup.pictures
    if shape.sight is None or not pictures:
        return
    if projects:  # a product keeps its input, and gelu too
        yield _kept(INPUT, pictures * shape.sight.features, setup.dtype, "what the tower gives")
        yield _kept(INPUT, 2 * pictures * shape.sight.tokens * shape.hidden, setup.dtype, "2 d a token of a picture")
    if projects or setup.whole:  # where words and pictures part again, in the backward pass
        yield _kept(INDICES, setup.tokens, "bool", "T: is this token of a picture?")


def _kept(kind: str, count: int, dtype: str, formula: str) -> Kept:
    return Kept(kind, count, dtype, count * SIZES[dtype], formula)
