"""Where every byte of a fine-tuning step goes, from a model's configuration alone.

    predict_memory("smollm2-135m", method="qlora", r=16) -> Ledger: rows of (what, formula, count, dtype, bytes)

In: what shape_of takes, and the fields of Setup. Out: a Ledger whose measured column is empty; measured.py fills
it. Weights, constants, adapters, gradients and moments are exact to the byte; activations are those of this library's
layers; CUDA's own memory is an assumption, and a note says so.
Source: QLoRA section 3; for the loss, loss.py: only rows that have a label go through the head, so logits are
(labels, vocabulary) and not (tokens, vocabulary).

Nothing is fitted. Not here: activations' table (activations.py), sizes (shape.py), what fits (fit.py).
"""

from collections.abc import Iterator
from typing import Any

from qlora_lab.kernels.product import PANEL, TILE, panel_height, panel_width
from qlora_lab.memory.activations import LETTERS, kept_after_layers, kept_by_layer, kept_by_layers, targeted
from qlora_lab.memory.ledger import PHASES, Ledger, Row
from qlora_lab.memory.setup import BYTES, Setup
from qlora_lab.memory.shape import LinearShape, Shape, shape_of
from qlora_lab.optim.paged_adamw import UNIT
from qlora_lab.optim.paging import PAGE_SIZE
from qlora_lab.quant.double_quant import GROUP_SIZE
from qlora_lab.quant.packing import group_of

FLOAT32 = 4
WEIGHTS, ADAPTERS, GRADIENTS, MOMENTS = "weights", "adapters", "gradients", "optimizer"
ACTIVATIONS, LOSS, WORKSPACE, RUNTIME = "activations", "loss", "workspace", "runtime"
MAP_BYTES = 256 * FLOAT32  # the table of double quantization, one a process
# All kernels of torch 1.13 loaded, measured in pytorch/pytorch#86509; loaded when first used it begins at 287,047,680
CUDA_CONTEXT = 666_632_192
CUDA_BLOCK = 20 * 2**20  # what torch's CUDACachingAllocator asks for at once, for tensors below 10 MiB
BEFORE_LOSS, AT_LOSS, IN_BACKWARD, LATE = ("loss", "backward"), ("loss",), ("backward",), ("end", "update")


def predict_memory(model: Any, method: str = "qlora", **setup: Any) -> Ledger:
    """The ledger of one training step.

    model: see shape_of; no weights are needed. method: "qlora", "lora" or "full". setup: fields of Setup, such as
    r=64, length=512, batch_size=1, gradient_checkpointing=True.
    Raises what shape_of and Setup raise, and ValueError for a target that the model does not have.

    >>> predict_memory("llama-7b", r=64).row("lora_A").count
    72876032
    """
    return ledger_of(shape_of(model), Setup(method=method, **setup))


def ledger_of(shape: Shape, setup: Setup) -> Ledger:
    """As predict_memory, from its two parts."""
    rows = [*_weights(shape, setup), *_adapters(shape, setup), *_gradients(shape, setup), *_moments(shape, setup)]
    rows += [*_activations(shape, setup), *_loss(shape, setup), *_workspace(shape, setup), *_runtime(setup)]
    words = f"{shape.name}, {shape.parameters:,} weights: {setup}"
    return Ledger(tuple(rows), words, setup.tokens, _notes(setup))


def _notes(setup: Setup) -> tuple[str, ...]:
    labels = f"{setup.labels:,} of {setup.tokens:,} tokens at once are labels: only their rows go through the head"
    if setup.device == "cuda":
        more = "CUDA's context and the allocator's rounding are assumptions: an H200 had 0.65 to 0.81 GB beside tensors"
    else:
        more = "this is what is asked for: glibc can hold twice as much, in gaps it cannot use; jemalloc does not"
    return LETTERS, labels, more


# -------------------------------------------------------------------------------------------------------------- weights


def _weights(shape: Shape, setup: Setup) -> Iterator[Row]:
    linears = [(one, shape.layers) for one in shape.linears]
    numel = sum(times * one.numel for one, times in linears)
    if setup.method == "qlora":
        yield from _quantized(linears, setup)
    else:
        yield _row(WEIGHTS, "linear layers", numel, setup.dtype, "out in")
    biases = sum(times * one.out_features for one, times in linears if one.bias)
    if biases:
        yield _row(WEIGHTS, "biases", biases, setup.dtype, "out")
    yield _row(WEIGHTS, "embeddings", shape.table, setup.dtype, "V d")
    head = "the embeddings, shared" if shape.tied else "V d"
    yield _row(WEIGHTS, "head", 0 if shape.tied else shape.table, setup.dtype, head)
    yield _row(WEIGHTS, "norms", (2 * shape.layers + 1) * shape.hidden, setup.dtype, "(2 L + 1) d")
    # transformers keeps its frequencies twice, the second as they were before any scaling
    yield _row(WEIGHTS, "rotary frequencies", 2 * (shape.head_dim // 2), "float32", "2 x head_dim / 2")


def _quantized(linears: list[tuple[LinearShape, int]], setup: Setup) -> Iterator[Row]:
    bits, size = setup.code_bits, setup.block_size
    codes, nbytes = group_of(bits)
    packed = sum(times * -(-one.numel // codes) * nbytes for one, times in linears)
    blocks = [(-(-one.numel // size), times) for one, times in linears]
    count = sum(times * n for n, times in blocks)
    layers = sum(times for _, times in linears)
    yield _row(WEIGHTS, "packed weights", packed, "uint8", f"weights x {bits} / 8")
    if setup.double_quant:
        scales = sum(times * -(-n // GROUP_SIZE) for n, times in blocks)
        yield _row(WEIGHTS, "absmax codes", count, "uint8", f"weights / {size}")
        yield _row(WEIGHTS, "group scales", scales, "float32", f"weights / ({size} x {GROUP_SIZE})")
        yield _row(WEIGHTS, "offsets", layers, "float32", "1 a layer")
    else:
        yield _row(WEIGHTS, "absmax", count, "float32", f"weights / {size}")
    tables = layers * 2**bits + setup.double_quant * MAP_BYTES // FLOAT32
    yield _row(WEIGHTS, "tables", tables, "float32", f"{2**bits} a layer{' + 256' * setup.double_quant}")


# ------------------------------------------------------------------------------------------------------ what is trained


def _trained(shape: Shape, setup: Setup) -> list[tuple[int, int]]:
    """(elements of a trained tensor, how many there are of that size)."""
    if setup.method != "full":
        sizes = [(setup.r * one.in_features, setup.r * one.out_features) for one in targeted(shape, setup)]
        return [(n, shape.layers) for pair in sizes for n in pair]
    matrices = [(one.numel, shape.layers) for one in shape.linears]
    biases = [(one.out_features, shape.layers) for one in shape.linears if one.bias]
    return [*matrices, *biases, (shape.hidden, 2 * shape.layers + 1), (shape.table, 2 - shape.tied)]


def _adapters(shape: Shape, setup: Setup) -> Iterator[Row]:
    chosen = targeted(shape, setup)
    if chosen:
        a = shape.layers * setup.r * sum(one.in_features for one in chosen)
        b = shape.layers * setup.r * sum(one.out_features for one in chosen)
        yield _row(ADAPTERS, "lora_A", a, setup.adapter_dtype, "r in")
        yield _row(ADAPTERS, "lora_B", b, setup.adapter_dtype, "r out")


def _gradients(shape: Shape, setup: Setup) -> Iterator[Row]:
    dtype, numel = _trained_dtype(setup), sum(n * times for n, times in _trained(shape, setup))
    # Micro-batches add to what the one before left, so from the second on gradients are always there.
    when = PHASES if setup.micro_batches > 1 else LATE
    yield _row(GRADIENTS, "gradients", numel, dtype, "1 for each trained weight", when)


def _trained_dtype(setup: Setup) -> str:
    return setup.dtype if setup.method == "full" else setup.adapter_dtype


def _moments(shape: Shape, setup: Setup) -> Iterator[Row]:
    trained = _trained(shape, setup)
    tensors, numel = sum(times for _, times in trained), sum(n * times for n, times in trained)
    if setup.in_pages:
        together, nbytes = UNIT[setup.optimizer_bits]
        units = sum(times * -(-n // together) for n, times in trained)
        pages = -(-units // (PAGE_SIZE // nbytes))
        frames = pages if setup.optimizer_budget is None else min(pages, setup.optimizer_budget // PAGE_SIZE)
        dtype = "float32" if setup.optimizer_bits == 32 else f"uint8, a constant for {together}"
        words = f"{frames} of {pages} pages of {PAGE_SIZE:,} in memory, {units * nbytes:,} bytes of state"
        yield Row(MOMENTS, "moments", words, 2 * numel, dtype, frames * PAGE_SIZE)
    else:
        yield _row(MOMENTS, "moments", 2 * numel, _trained_dtype(setup), "2 for each trained weight")
    yield Row(MOMENTS, "step counters", "1 for each trained tensor", tensors, "float32", FLOAT32 * tensors)


# ---------------------------------------------------------------------------------------- what a step needs for a while


def _activations(shape: Shape, setup: Setup) -> Iterator[Row]:
    for one in (*kept_by_layers(shape, setup), *kept_after_layers(shape, setup)):
        yield Row(ACTIVATIONS, one.kind, one.formula, one.count, one.dtype, one.nbytes, when=BEFORE_LOSS)
    if setup.gradient_checkpointing:
        again = kept_by_layer(shape, setup, first=False)
        size = sum(one.nbytes for one in again)
        count = sum(one.count for one in again)
        yield Row(ACTIVATIONS, "a layer computed again", "one layer's", count, "mixed", size, when=("backward", "end"))


def _loss(shape: Shape, setup: Setup) -> Iterator[Row]:
    n, V = setup.labels, shape.vocabulary
    yield _row(LOSS, "log-softmax", n * V, "float32", "n V: kept", AT_LOSS)
    # Its gradient and that of the logits. In the forward pass logits are there in their own dtype and in float32,
    # which is no more.
    yield _row(LOSS, "loss workspace", 2 * n * V, "float32", "2 n V: gradients, once logits are gone", AT_LOSS)


def _workspace(shape: Shape, setup: Setup) -> Iterator[Row]:
    T, d, f = setup.tokens, shape.hidden, shape.inner
    flight = 2 * T * (d + f)
    words = "2 T (d + f): of the residual stream, of up and gate"
    yield _row(WORKSPACE, "gradients of activations", flight, setup.dtype, words, ("backward", "end"))
    if setup.method == "qlora":
        yield _buffer(shape, setup)
    yield _temporaries(shape, setup)


def _temporaries(shape: Shape, setup: Setup) -> Row:
    """The most that an update has at once, such as two roots of the second moments."""
    trained = _trained(shape, setup)
    largest, dtype = max(n for n, _ in trained), _trained_dtype(setup)
    if setup.in_pages:  # a page at a time; 8 bits are changed in place, and 16 bits are copied to float32 before that
        together, nbytes = UNIT[setup.optimizer_bits]
        copies = 2 * (setup.optimizer_bits == 32) + 2 * (dtype != "float32")
        count, dtype, words = copies * min(largest, PAGE_SIZE // nbytes * together), "float32", f"{copies} of a page"
    elif setup.device == "cuda":
        # torch's AdamW works on all parameters at once there, and needs them once more: its documentation says so
        count, words = sum(n * times for n, times in trained), "trained weights at once"
    else:
        count, words = 2 * largest, "2 of the largest trained tensor"
    return _row(WORKSPACE, "the update's temporaries", count, dtype, words, ("update",))


def _buffer(shape: Shape, setup: Setup) -> Row:
    """The decoded weight: a panel of rows on the CPU, which stays; on a GPU the whole of one."""
    if setup.device == "cuda":
        largest = max(one.numel for one in shape.linears)
        return _row(WORKSPACE, "decoded weight", largest, setup.dtype, "out in, the largest", ("backward", "end"))
    count = max(_panel(one, setup.block_size) for one in shape.linears)
    words = f"a panel of at most {PANEL:,}"
    if setup.dtype != "float32":  # where float32 products are the faster ones; elsewhere it is less
        count += 2 * min(TILE, setup.tokens * max(shape.inner, shape.hidden))
        words += f", tiles of at most {TILE:,}"
    return _row(WORKSPACE, "decoded weight", count, "float32", words)


def _panel(one: LinearShape, block_size: int) -> int:
    """Elements of the largest panel that product.forward or product.backward decodes."""
    height = min(panel_height(one.in_features, block_size), one.out_features)
    width = panel_width(one.out_features, one.in_features, block_size)
    return max(height * one.in_features, width * one.out_features)


def _runtime(setup: Setup) -> Iterator[Row]:
    cuda = setup.device == "cuda"
    what = "an assumption: all kernels loaded" if cuda else "no GPU"
    yield Row(RUNTIME, "CUDA context", what, cuda * CUDA_CONTEXT, "uint8", cuda * CUDA_CONTEXT)
    block = "an assumption: one block that is not full" if cuda else "not predicted"
    yield Row(RUNTIME, "allocator's rounding", block, cuda * CUDA_BLOCK, "uint8", cuda * CUDA_BLOCK)


def _row(group: str, what: str, count: int, dtype: str, formula: str, when: tuple[str, ...] = PHASES) -> Row:
    size = 1 if dtype == "uint8" else BYTES[dtype]
    return Row(group, what, formula, count, dtype, size * count, when=when)
