"""Predict every byte of a fine-tuning step from a model's configuration alone.

    predict_memory("smollm2-135m", method="qlora", r=16) -> Ledger: rows of (what, formula, count, dtype, bytes)

In: what shape_of takes, and the fields of Setup. Out: a Ledger whose measured column is empty; measured.py fills it.
Weights, constants, adapters, gradients and moments are exact to the byte; activations are those of this library's
layers; CUDA's own memory is an assumption, as a note says.
Source: QLoRA section 3; for the loss, train/loss.py: only rows with a label go through the head, so logits are
(labels, vocabulary) and not (tokens, vocabulary).

No number is fitted. Not here: the table of activations (activations.py), sizes (shape.py), what fits (fit.py).
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from qlora_lab.kernels.product import PANEL, TILE, panel_height, panel_width
from qlora_lab.memory.activations import LETTERS, kept_after_layers, kept_by_layer, kept_by_layers
from qlora_lab.memory.learned import FORMULA, learned_by_method
from qlora_lab.memory.ledger import PHASES, Ledger, LedgerRow
from qlora_lab.memory.linear_shape import LinearShape
from qlora_lab.memory.setup import BYTES, LOW_RANK, Setup
from qlora_lab.memory.shape import Shape, shape_of
from qlora_lab.memory.sight import check_seeing
from qlora_lab.memory.targets import targeted
from qlora_lab.optim.paged_adamw import UNIT
from qlora_lab.optim.paging import PAGE_SIZE
from qlora_lab.quant.double_quant import GROUP_SIZE
from qlora_lab.quant.packing import group_of

FLOAT32 = 4
WEIGHTS, ADAPTERS, GRADIENTS, MOMENTS = "weights", "adapters", "gradients", "optimizer"
MASTERS, PLACES = "master copies", "places in a picture"
ACTIVATIONS, LOSS, WORKSPACE, RUNTIME = "activations", "loss", "workspace", "runtime"
MAP_BYTES = 256 * FLOAT32  # the table of double quantization, one per process
# All kernels of torch 1.13 loaded, from pytorch/pytorch#86509; with lazy loading it starts at 287,047,680.
CUDA_CONTEXT = 666_632_192
CUDA_BLOCK = 20 * 2**20  # torch's CUDACachingAllocator requests this much at once for tensors below 10 MiB
UNTIL_BACKWARD = ("loss", "backward")
UNTIL_UPDATE = ("loss", "backward", "end")
IN_BACKWARD = ("backward", "end")
LATE = ("end", "update")
Matrices = list[tuple[LinearShape, int]]  # each with the number of its like in the model


def predict_memory(model: Any, method: str = "qlora", **setup: Any) -> Ledger:
    """Predict the ledger of one training step.

    model: see shape_of; weights are not needed. method: "qlora", "lora", or another of add_adapter's. setup: fields of
    Setup, such as r=64, length=512, batch_size=1, gradient_checkpointing=True.
    Raises whatever shape_of and Setup raise, and ValueError for a target that the model does not have.

    >>> predict_memory("llama-7b", r=64).row("lora_A").count
    72876032
    """
    return ledger_of(shape_of(model), Setup(method=method, **setup))


def ledger_of(shape: Shape, setup: Setup) -> Ledger:
    """Do the same from a Shape and a Setup.

    Raises ValueError for Houlsby's adapters on a mixture of experts, for parts that the model does not have, and
    for more pictures than a row has room for.
    """
    check_seeing(shape, setup)
    if shape.experts and setup.method == "houlsby":
        raise ValueError(f"{shape.name} routes tokens to experts, which method='houlsby' cannot adapt: choose qlora")
    rows = [*_weights(shape, setup), *_adapters(shape, setup), *_gradients(shape, setup), *_moments(shape, setup)]
    rows += [*_activations(shape, setup), *_loss(shape, setup), *_workspace(shape, setup), *_runtime(setup)]
    words = f"{shape.name}, {shape.parameters:,} weights: {setup}"
    return Ledger(tuple(rows), words, setup.tokens, _notes(shape, setup), _idle(shape, setup))


def _notes(shape: Shape, setup: Setup) -> tuple[str, ...]:
    labels = f"{setup.labels:,} of {setup.tokens:,} tokens at once are labels: only their rows go through the head"
    if setup.device == "cuda":
        more = "CUDA's context and the allocator's rounding are assumptions: an H200 had 0.65 to 0.81 GB beside tensors"
    else:
        more = "this is what is asked for: glibc can hold twice as much, in gaps it cannot use; jemalloc does not"
    notes = LETTERS, labels, more
    if shape.sight and not setup.pictures:
        tokens = shape.sight.tokens
        return *notes, f"rows of text alone: with --pictures N a row has N, which take {tokens:,} of its tokens each"
    return notes


def _idle(shape: Shape, setup: Setup) -> int:
    """Bytes of experts that a token is not routed to, constants included: all experts are of one size."""
    experts = [(matrix, shape.layers * (shape.experts - shape.experts_per_token)) for matrix in shape.expert]
    if setup.is_packed:
        return sum(row.predicted for row in _packed([], experts, setup))
    return sum(times * matrix.numel for matrix, times in experts) * BYTES[setup.dtype]


def _weights(shape: Shape, setup: Setup) -> Iterator[LedgerRow]:
    linears = [(linear, shape.layers) for linear in shape.linears]
    experts = [(matrix, shape.layers * shape.experts) for matrix in shape.expert]
    if setup.is_packed:
        beside = _packed_beside(shape, setup)
        yield from _packed([*linears, *beside], experts, setup)
        tables = shape.layers * (len(shape.linears) + len(shape.expert))  # one for all matrices of a stack
        tables += sum(times for _, times in beside)
        levels = 2**setup.code_bits
        count = tables * levels + setup.double_quant * MAP_BYTES // FLOAT32
        yield _row(WEIGHTS, "tables", count, "float32", f"{levels} a matrix{' + 256' * setup.double_quant}")
    else:
        yield _row(WEIGHTS, "linear layers", _numel(linears), setup.dtype, "out in")
        if experts:
            yield _row(WEIGHTS, "experts", _numel(experts), setup.dtype, "E x 3 d f")
    biases = sum(times * linear.out_features for linear, times in linears if linear.bias)
    if biases:
        yield _row(WEIGHTS, "biases", biases, setup.dtype, "out")
    yield _row(WEIGHTS, "embeddings", shape.table, setup.dtype, "V d")
    head = "the embeddings, shared" if shape.tied else "V d"
    yield _row(WEIGHTS, "head", 0 if shape.tied else shape.table, setup.dtype, head)
    if shape.experts:
        gates = " + L d: of the shared expert" * bool(shape.shared)
        yield _row(WEIGHTS, "routers", shape.layers * shape.router, setup.dtype, f"L E d{gates}")
    heads = " + 2 L head_dim" * shape.head_norms + " + L (q + kv)" * shape.whole_norms
    yield _row(WEIGHTS, "norms", shape.norms, setup.dtype, f"(2 L + 1) d{heads}")
    # transformers keeps its frequencies twice: as used, and as they were before any scaling
    yield _row(WEIGHTS, "rotary frequencies", 2 * (shape.head_dim // 2), "float32", "2 x head_dim / 2")
    yield from _beside(shape, setup)


def _packed_beside(shape: Shape, setup: Setup) -> Matrices:
    """The linear layers of the parts that are quantised beside a language model."""
    parts = shape.sight.parts if shape.sight else ()
    return [matrix for part in parts if part.name in setup.also for matrix in part.linears]


def _beside(shape: Shape, setup: Setup) -> Iterator[LedgerRow]:
    """A tower and a projector, but for the linear layers that are packed with those of the language model."""
    for part in shape.sight.parts if shape.sight else ():
        packed = part.name in setup.also
        count = part.rest + (0 if packed else _numel(part.linears))
        yield _row(WEIGHTS, part.name, count, setup.dtype, "biases and the like" if packed else "all of it")
    if shape.sight:
        count = shape.sight.positions
        yield LedgerRow(WEIGHTS, PLACES, "1 for each patch, and 1", count, "int64", 8 * count)


def _numel(matrices: Matrices) -> int:
    return sum(times * matrix.numel for matrix, times in matrices)


def _packed(linears: Matrices, experts: Matrices, setup: Setup) -> Iterator[LedgerRow]:
    """Codes and constants. Each expert is a matrix with blocks, groups and an offset of its own."""
    bits = setup.code_bits
    size = setup.block_size
    codes, nbytes = group_of(bits)  # of the smallest whole group: 2 codes in 1 byte for 4 bits
    for what, matrices in (("packed weights", linears), ("packed experts", experts)):
        packed = sum(times * -(-matrix.numel // codes) * nbytes for matrix, times in matrices)
        if matrices:
            yield _row(WEIGHTS, what, packed, "uint8", f"weights x {bits} / 8")
    blocks = [(-(-matrix.numel // size), times) for matrix, times in (*linears, *experts)]  # the last may be partial
    count = sum(times * n for n, times in blocks)
    if setup.double_quant:
        scales = sum(times * -(-n // GROUP_SIZE) for n, times in blocks)
        yield _row(WEIGHTS, "absmax codes", count, "uint8", f"weights / {size}")
        yield _row(WEIGHTS, "group scales", scales, "float32", f"weights / ({size} x {GROUP_SIZE})")
        yield _row(WEIGHTS, "offsets", sum(times for _, times in blocks), "float32", "1 a matrix")
    else:
        yield _row(WEIGHTS, "absmax", count, "float32", f"weights / {size}")


def _trained(shape: Shape, setup: Setup) -> list[tuple[int, int]]:
    """List (elements of a trained tensor, number of tensors of that size)."""
    if setup.method in LOW_RANK:
        adapted = targeted(shape, setup).linears
        magnitudes = [linear.out_features for linear in adapted if setup.method == "dora"]
        return [(n, shape.layers) for n in (*chain(*_factors(shape, setup)), *magnitudes)]
    return learned_by_method(shape, setup)


def _factors(shape: Shape, setup: Setup) -> list[tuple[int, int]]:
    """List the elements of lora_A and lora_B of each adapted matrix of a layer."""
    adapted = targeted(shape, setup)
    # a pair for each expert, and the pairs of all experts in two tensors: idle ones have theirs, too
    matrices = [*((linear, 1) for linear in adapted.linears), *((matrix, shape.experts) for matrix in adapted.experts)]
    return [(n * setup.r * matrix.in_features, n * setup.r * matrix.out_features) for matrix, n in matrices]


def _adapters(shape: Shape, setup: Setup) -> Iterator[LedgerRow]:
    factors = _factors(shape, setup)
    if setup.method not in (*LOW_RANK, "full"):  # full fine-tuning adds no weights
        count = sum(n * times for n, times in learned_by_method(shape, setup))
        yield _row(ADAPTERS, setup.method, count, setup.adapter_dtype, FORMULA[setup.method])
    if setup.copies:
        count = sum(n * times for n, times in _trained(shape, setup))
        yield _row(MOMENTS, MASTERS, count, "float32", "1 for each trained weight")
    if factors:
        a, b = (shape.layers * sum(sizes) for sizes in zip(*factors, strict=True))
        times = "; of experts E times" * bool(targeted(shape, setup).experts)
        yield _row(ADAPTERS, "lora_A", a, setup.adapter_dtype, f"r in{times}")
        yield _row(ADAPTERS, "lora_B", b, setup.adapter_dtype, f"r out{times}")
        out = b // setup.r  # of linear layers: experts have neither DoRA nor PiSSA
        if setup.method == "dora":
            yield _row(ADAPTERS, "lora_magnitude_vector", out, setup.adapter_dtype, "out")
            yield _row(ADAPTERS, "lengths", out, "float32", "out: of the base's rows")
        if setup.method == "pissa":
            yield _row(ADAPTERS, "first_A", a, "float32", "r in: what A was at first")
            yield _row(ADAPTERS, "first_B", b, "float32", "r out")


def _gradients(shape: Shape, setup: Setup) -> Iterator[LedgerRow]:
    dtype = _trained_dtype(setup)
    numel = sum(n * times for n, times in _trained(shape, setup))
    summed = setup.micro_batches > 1
    in_copies = summed and dtype != "float32"  # 16-bit gradients move into float32 sums, all but the last micro-batch's
    if in_copies and setup.micro_batches == 2:  # no pass meets the sums: they are gradients again before the last one
        when, sums_when = (*UNTIL_BACKWARD, "update"), ("end",)
    else:  # each micro-batch adds to the gradients of the one before, so from the second on they stay allocated
        when, sums_when = PHASES if summed and not in_copies else LATE, UNTIL_UPDATE
    yield _row(GRADIENTS, "gradients", numel, dtype, "1 for each trained weight", when)
    if in_copies:
        yield _row(GRADIENTS, "sums of gradients", numel, "float32", "1 for each trained weight", sums_when)


def _trained_dtype(setup: Setup) -> str:
    return setup.dtype if setup.method == "full" else setup.adapter_dtype


def _moments_dtype(setup: Setup) -> str:
    return "float32" if setup.copies else _trained_dtype(setup)  # those of the master copies


def _moments(shape: Shape, setup: Setup) -> Iterator[LedgerRow]:
    trained = _trained(shape, setup)
    tensors = sum(times for _, times in trained)
    numel = sum(n * times for n, times in trained)
    if setup.in_pages:
        together, nbytes = UNIT[setup.optimizer_bits]  # elements of a unit, and bytes of both their moments
        units = sum(times * -(-n // together) for n, times in trained)  # pages hold whole units
        pages = -(-units // (PAGE_SIZE // nbytes))
        frames = pages if setup.optimizer_budget is None else min(pages, setup.optimizer_budget // PAGE_SIZE)
        dtype = "float32" if setup.optimizer_bits == 32 else f"uint8, a constant for {together}"
        words = f"{frames} of {pages} pages of {PAGE_SIZE:,} in memory, {units * nbytes:,} bytes of state"
        yield LedgerRow(MOMENTS, "moments", words, 2 * numel, dtype, frames * PAGE_SIZE)
    else:
        yield _row(MOMENTS, "moments", 2 * numel, _moments_dtype(setup), "2 for each trained weight")
    yield LedgerRow(MOMENTS, "step counters", "1 for each trained tensor", tensors, "float32", FLOAT32 * tensors)


def _activations(shape: Shape, setup: Setup) -> Iterator[LedgerRow]:
    for kept in (*kept_by_layers(shape, setup), *kept_after_layers(shape, setup)):
        yield LedgerRow(ACTIVATIONS, kept.kind, kept.formula, kept.count, kept.dtype, kept.nbytes, when=UNTIL_BACKWARD)
    if setup.gradient_checkpointing:
        again = list(kept_by_layer(shape, setup, first=False))  # one layer at a time is there in full
        size = sum(kept.nbytes for kept in again)
        count = sum(kept.count for kept in again)
        yield LedgerRow(ACTIVATIONS, "a layer computed again", "one layer's", count, "mixed", size, when=IN_BACKWARD)


def _loss(shape: Shape, setup: Setup) -> Iterator[LedgerRow]:
    numel = setup.labels * shape.vocabulary  # (labels, vocabulary): rows without a label never reach the head
    yield _row(LOSS, "log-softmax", numel, "float32", "n V: kept", ("loss",))
    # Two gradients: of the log-softmax and of the logits. The forward pass needs no more: it has the logits twice, in
    # their own dtype and in float32.
    yield _row(LOSS, "loss workspace", 2 * numel, "float32", "2 n V: gradients, once logits are gone", ("loss",))


def _workspace(shape: Shape, setup: Setup) -> Iterator[LedgerRow]:
    T, d, f = setup.tokens, shape.hidden, shape.inner
    count, words = 2 * T * (d + f), "2 T (d + f): of the residual stream, of up and gate"
    if shape.experts:  # a gradient goes from T k pairs to tokens; how many tokens one expert has at most is not known
        count = 2 * T * d + T * shape.experts_per_token * 3 * d + 4 * T * f
        words = "2 T d + 3 T k d + 4 T f: of the residual stream, of pairs, of an expert that all tokens share"
    yield _row(WORKSPACE, "gradients of activations", count, setup.dtype, words, IN_BACKWARD)
    if pairs := targeted(shape, setup).experts:
        numel = shape.experts * setup.r * sum(matrix.in_features + matrix.out_features for matrix in pairs)
        words = "E r (in + out) of one layer: of each expert, before they are one tensor"
        yield _row(WORKSPACE, "gradients of pairs", numel, setup.adapter_dtype, words, IN_BACKWARD)
    if setup.is_packed:
        yield _buffer(shape, setup)
    yield _temporaries(shape, setup)


def _temporaries(shape: Shape, setup: Setup) -> LedgerRow:
    """The largest temporaries of an update, such as two roots of the second moments."""
    trained = _trained(shape, setup)
    largest = max(n for n, _ in trained)
    numel = sum(n * times for n, times in trained)
    dtype = _moments_dtype(setup)
    if setup.in_pages:  # a page at a time: 8-bit moments change in place; 16-bit weights are first copied to float32
        together, nbytes = UNIT[setup.optimizer_bits]
        copies = 2 * (setup.optimizer_bits == 32) + 2 * (dtype != "float32")
        count = copies * min(largest, PAGE_SIZE // nbytes * together)
        dtype = "float32"
        words = f"{copies} of a page"
    elif setup.device == "cuda":  # torch's AdamW updates all that it is given at once and, as documented, copies them
        count = largest if setup.copies else numel
        words = "the largest trained tensor" if setup.copies else "trained weights at once"
    else:
        count = 2 * largest
        words = "2 of the largest trained tensor"
    if setup.copies:  # they are moved one at a time
        count += largest
        words += ", and the gradient of a copy"
    return _row(WORKSPACE, "the update's temporaries", count, dtype, words, ("update",))


def _buffer(shape: Shape, setup: Setup) -> LedgerRow:
    """The decoded weight: on the CPU one panel of rows, kept for the next product; on a GPU a whole weight."""
    matrices = [*shape.linears, *shape.expert, *(linear for linear, _ in _packed_beside(shape, setup))]
    if setup.device == "cuda":
        largest = max(matrix.numel for matrix in matrices)
        return _row(WORKSPACE, "decoded weight", largest, setup.dtype, "out in, the largest", IN_BACKWARD)
    count = max(_panel(matrix, setup.block_size) for matrix in matrices)
    words = f"a panel of at most {PANEL:,}"
    if setup.dtype != "float32":  # tiles of x and y, if float32 products win the race; otherwise less is needed
        # gate and up of an expert are one product, twice as wide
        count += 2 * min(TILE, setup.tokens * max(shape.inner * (1 + bool(shape.experts)), shape.shared, shape.hidden))
        words += f", tiles of at most {TILE:,}"
    return _row(WORKSPACE, "decoded weight", count, "float32", words)


def _panel(linear: LinearShape, block_size: int) -> int:
    """Count the elements of the largest panel that product.forward or product.backward decodes."""
    height = min(panel_height(linear.in_features, block_size), linear.out_features)
    width = panel_width(linear.out_features, linear.in_features, block_size)
    return max(height * linear.in_features, width * linear.out_features)


def _runtime(setup: Setup) -> Iterator[LedgerRow]:
    cuda = setup.device == "cuda"
    what = "an assumption: all kernels loaded" if cuda else "no GPU"
    yield LedgerRow(RUNTIME, "CUDA context", what, cuda * CUDA_CONTEXT, "uint8", cuda * CUDA_CONTEXT)
    block = "an assumption: one block that is not full" if cuda else "not predicted"
    yield LedgerRow(RUNTIME, "allocator's rounding", block, cuda * CUDA_BLOCK, "uint8", cuda * CUDA_BLOCK)


def _row(group: str, what: str, count: int, dtype: str, formula: str, when: tuple[str, ...] = PHASES) -> LedgerRow:
    size = 1 if dtype == "uint8" else BYTES[dtype]
    return LedgerRow(group, what, formula, count, dtype, size * count, when=when)
