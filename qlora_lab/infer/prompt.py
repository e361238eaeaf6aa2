"""The tokens of a prompt through all layers with kernels, for their keys and values: the fast twin of step.forward.

In: ids (tokens,) of one row, and the cache. Out: the cache holds their keys and values, equal to step.forward's within
rounding; in layers that compute in int8 (int8.py) within what the rounding of x does there. Nobody asks for the hidden
states of a prompt but the layers, so the last layer computes keys and values alone.

Between two products a row of a token is read and written once: residual sum, norm and rounding are one pass.
"""

import torch

from qlora_lab.infer import int8, step as readable
from qlora_lab.infer.cache import Cache
from qlora_lab.infer.stack import Product, Stack
from qlora_lab.kernels import few_tokens, float_products, int8_products, prompt_attention, prompt_rows
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
    for i in range(len(stack.layers)):
        found = _normed(stack, i, "attention", x, more, room)
        kept = _put(stack, cache, i, row, found[:tokens])
        if i < len(stack.layers) - 1:  # what the last one adds to x nobody reads
            attended = prompt_attention.attend(found[:tokens], stack.heads, (cache.cos, cache.sin), kept, start)
            more = _passed(attended, stack.layers[i].o, room)
            both = _normed(stack, i, "mlp", x, more, room)
            down = stack.layers[i].down
            more = multiply(prompt_rows.gated(both, room, _forms(tokens, down)), room, down)
    cache.lengths[row] += tokens


def _normed(stack: Stack, i: int, part: str, x: torch.Tensor, more: torch.Tensor | None, room: Room) -> torch.Tensor:
    """Add `more` to x, and return what layer i multiplies the norm of it with, in its attention or its mlp."""
    layer = stack.layers[i]
    if part == "mlp":
        weight, parts = layer.mlp_norm, (layer.gate, layer.up)
    else:
        last = i == len(stack.layers) - 1
        weight, parts = layer.attention_norm, (layer.k, layer.v) if last else (layer.q, layer.k, layer.v)
    rows, finite = prompt_rows.normed(x, more, (weight.float(), stack.eps), room, _forms(room.tokens, *parts))
    if not finite:
        guilty = i if part == "mlp" else i - 1  # what the layer before added comes to light here
        raise FloatingPointError(f"layer {guilty} of {len(stack.layers)} computes a number that is not finite")
    return multiply(rows, room, *parts)


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
