"""The tokens of a prompt through all layers with kernels, for their keys and values: the fast twin of step.forward.

In: ids (tokens,) of one row, and the cache. Out: the cache holds their keys and values, equal to step.forward's within
rounding; in layers that compute in int8 (int8.py) within what the rounding of x does there, and of their attention to
bf16 on a CPU that multiplies pairs of bf16. Nobody asks for the hidden states of a prompt but the layers, so the last
layer computes keys and values alone.

Between two products a row of a token is read and written once: residual sum, norm and rounding are one pass.
"""

import torch

from qlora_lab.infer import int8, step as readable
from qlora_lab.infer.cache import Cache
from qlora_lab.infer.stack import Layer, Product, Stack
from qlora_lab.kernels import (
    few_tokens,
    float_products,
    int8_products,
    prompt_attention,
    prompt_gate,
    prompt_pairs,
    prompt_rows,
)
from qlora_lab.kernels.prompt_rows import Room, Rows
from qlora_lab.quant.quantize import QuantizedTensor


def forward(stack: Stack, ids: torch.Tensor, cache: Cache, row: int = 0) -> None:
    """Put keys and values of `ids` (tokens,) into `row` of the cache. Raises as step.forward.

    A NaN of the last layer is left to the step that follows, which reads what it has put into the cache.
    """
    cache.check_room(torch.tensor([row], dtype=torch.int64), len(ids))
    start, tokens = int(cache.lengths[row]), len(ids)
    room = prompt_rows.Room(tokens)
    x = stack.embedding[ids].float()  # (tokens, hidden)
    more = None  # what a layer adds to x: the next pass over x adds it
    count = len(stack.layers)
    for i, layer in enumerate(stack.layers):
        last = i == count - 1
        parts = (layer.k, layer.v) if last else (layer.q, layer.k, layer.v)
        # what the layer before added comes to light here
        rows = _normed(x, more, (layer.attention_norm, stack.eps), room, parts, f"layer {i - 1} of {count}")
        found = multiply(rows, room, *parts)
        kept = _put(stack, cache, i, row, found[:tokens])
        if not last:  # nobody reads what the last one adds to x
            attended = attention_of(layer, stack)(found[:tokens], stack.heads, (cache.cos, cache.sin), kept, start)
            more = _passed(attended, layer.o, room)
            both = layer.gate, layer.up
            rows = _normed(x, more, (layer.mlp_norm, stack.eps), room, both, f"layer {i} of {count}")
            more = multiply(_gated(rows, layer, room), room, layer.down)
    cache.lengths[row] += tokens


def attention_of(layer: Layer, stack: Stack):
    """Return the kernel's `attend` for a layer: in pairs of bf16 if it computes in int8 and this CPU has them."""
    in_int8 = any(part.int8 for part in layer.products)
    return (prompt_pairs if in_int8 and prompt_pairs.can_attend(stack.head_dim) else prompt_attention).attend


def _normed(x: torch.Tensor, more: torch.Tensor | None, norm: tuple, room: Room, parts, guilty: str) -> Rows:
    """Add `more` to x, and return the norm of it as `parts` read it. norm: weight and eps. guilty: whose sum it is."""
    weight, eps = norm
    rows, finite = prompt_rows.normed(x, more, (weight.float(), eps), room, _forms(room.tokens, *parts))
    if not finite:
        raise FloatingPointError(f"{guilty} computes a number that is not finite")
    return rows


def _gated(rows: Rows, layer: Layer, room: Room) -> Rows:
    """Return silu(gate) * up of these rows, as the layer's `down` reads it."""
    parts, forms = (layer.gate, layer.up), _forms(room.tokens, layer.down)
    weights = [part.weight for part in parts]
    size, columns = weights[0].shape
    alone = all(part.int8 and part.lora is None and part.bias is None for part in parts)
    # Rows of one size share their memory, so what is read must have another size than what is written.
    if alone and forms == {"numbers"} and size != columns and prompt_gate.can_multiply(*weights):
        levels = [int8.round_levels(weight.levels) for weight in weights]
        gated = room.rows(size, forms)
        plain = [weight.plain for weight in weights]
        prompt_gate.multiply(rows.numbers, plain, levels, (size, columns), gated.numbers)
        return gated
    return prompt_rows.gated(multiply(rows, room, *parts), room, forms)


def _passed(x: torch.Tensor, part: Product, room: Room) -> torch.Tensor:
    return multiply(prompt_rows.as_they_are(x, room, _forms(room.tokens, part)), room, part)


def multiply(rows: Rows, room: Room, *parts: Product) -> torch.Tensor:
    """Return the products side by side: (tokens, filled up to whole tiles; rows of all weights) float32."""
    sizes = [part.weight.shape[0] for part in parts]
    out = room.out(sum(sizes))  # side by side, as rotation and gate read them
    column = 0
    for part, size in zip(parts, sizes, strict=True):
        weight, theirs = part.weight, out[: room.tokens, column : column + size]
        form = _form(room.tokens, part)
        if form == "numbers":  # rounded to int8
            levels = int8.round_levels(weight.levels)
            int8_products.multiply(rows.numbers, weight.plain, weight.shape, *levels, out, column)
        elif form == "tiles":
            float_products.multiply(rows.tiles, weight.plain, weight.shape, out, column)
        else:
            theirs.copy_(readable.multiply(rows.plain, part._replace(bias=None, lora=None)))
        if part.lora is not None or part.bias is not None:
            theirs += readable.beside(rows.plain, part)
        column += size
    return out


def _form(tokens: int, part: Product) -> str:
    """The field of Rows that the kernel for this weight reads."""
    rows = part.weight.shape[0]
    if not isinstance(part.weight, QuantizedTensor) or not float_products.can_multiply(rows):
        return "plain"
    if part.int8:
        return "numbers"
    return "tiles" if tokens > few_tokens.MAX_TOKENS else "plain"  # few tokens have a kernel of their own


def _forms(tokens: int, *parts: Product) -> frozenset[str]:
    beside = {"plain"} if any(part.lora is not None for part in parts) else set()
    return frozenset({_form(tokens, part) for part in parts} | beside)


def _put(stack: Stack, cache: Cache, layer: int, row: int, found: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn the keys, put them and the values into the cache, and return those of all tokens as the kernel reads them.

    found: (tokens, ...), which ends with keys and values.
    """
    start = int(cache.lengths[row])
    if cache.keys.dtype == torch.float32:
        kept = cache.keys[layer, row], cache.values[layer, row]
        prompt_attention.put(found, (cache.cos, cache.sin), kept, start)
        return kept
    # of a cache in 8 bits: the twin rounds them, and they are read back as attention needs them
    there = slice(start, start + len(found))
    width = stack.kv_heads * stack.head_dim
    k, v = (readable.by_heads(part, stack.head_dim) for part in found[:, -2 * width :].split(width, 1))
    return cache.put(layer, row, readable.rotate(k, cache.cos[there], cache.sin[there]), v)
