"""What a token passes in a model of LLaMA's shape, in plain torch: the readable twin of kernels/decode_step.py.

In: ids (tokens,) of one row, and the cache with what came before. Out: the last hidden states (tokens, hidden), or
logits. All of it is float32, whatever the model's dtype, and weights count as they were stored, so an answer is that of
the dequantised model in float32.
Source: LLaMA (arXiv 2302.13971) section 2.2: pre-normalization [RMSNorm], SwiGLU, rotary embeddings (arXiv 2104.09864).

    x = embedding[ids]
    each layer:  x = x + o(attention(q, k, v of norm(x)));   x = x + down(silu(gate) * up of norm(x))
    logits = head(norm(x))
"""

import torch
from torch.nn import functional as F

from qlora_lab.infer import int8
from qlora_lab.infer.cache import Cache
from qlora_lab.infer.stack import Layer, Product, Stack
from qlora_lab.kernels import product as panels
from qlora_lab.model import product_4bit
from qlora_lab.quant.quantize import QuantizedTensor

NUMBERS_AT_ONCE = 2**20  # of a gate, for the tokens of a prompt that are read together: three such tensors are 12 MiB
FEWEST, MOST = 64, 512  # tokens: fewer decode each weight too often, and more make no product faster


def forward(stack: Stack, ids: torch.Tensor, cache: Cache, row: int = 0) -> torch.Tensor:
    """Return the normed hidden states (tokens, hidden) of `ids` (tokens,), which continue `row` of the cache.

    Raises ValueError if they do not fit, and FloatingPointError, which names the layer, for a NaN.
    """
    cache.check_room(torch.tensor([row], dtype=torch.int64), len(ids))
    start = int(cache.lengths[row])
    angles = cache.cos[start : start + len(ids)], cache.sin[start : start + len(ids)]  # (tokens, head_dim) each
    x = stack.embedding[ids].float()  # (tokens, hidden)
    for i, layer in enumerate(stack.layers):
        normed = rms_norm(x, layer.attention_norm, stack.eps)
        q, k, v = (by_heads(multiply(normed, part), stack.head_dim) for part in (layer.q, layer.k, layer.v))
        _check(i, stack, q, k)  # torch's softmax makes the NaN of a single key a finite number
        keys, values = cache.put(i, row, rotate(k, *angles), v)
        x = x + multiply(attend(rotate(q, *angles), keys, values), layer.o)
        x = x + gated(rms_norm(x, layer.mlp_norm, stack.eps), layer)
        _check(i, stack, x)
    cache.lengths[row] += len(ids)
    return rms_norm(x, stack.norm, stack.eps)


def _check(i: int, stack: Stack, *numbers: torch.Tensor) -> None:
    if not all(some.isfinite().all() for some in numbers):
        raise FloatingPointError(f"layer {i} of {len(stack.layers)} computes a number that is not finite")


def read_prompt(stack: Stack, ids: torch.Tensor, cache: Cache, row: int = 0, in_int8: bool = False) -> None:
    """Put keys and values of `ids` (tokens,) into `row` of the cache, a part of them at a time. Raises as forward.

    in_int8: all but a text's first token pass layers that compute in int8; ValueError if no layer can. Nearly every
    head looks at the first token (attention sinks, arXiv 2309.17453), whose numbers are the largest: its error would
    reach all others. In float32 it costs a hundredth of a prompt of 512, and the tokens' distributions move a quarter
    less.
    """
    if in_int8:
        if not cache.lengths[row]:
            read_prompt(stack, ids[:1], cache, row)
            ids = ids[1:]
        stack = int8.with_int8(stack)
    from qlora_lab.infer import fast, prompt  # built on this file

    by_kernel = fast.can_step(stack)
    width = stack.layers[0].gate.weight.shape[0]
    at_once = min(MOST, max(FEWEST, NUMBERS_AT_ONCE // width))
    for some in ids.split(at_once) if len(ids) else ():
        through = (prompt.forward if len(some) > 1 else fast.read_token) if by_kernel else forward
        through(stack, some, cache, row)


def step(stack: Stack, ids: torch.Tensor, cache: Cache, rows: torch.Tensor) -> torch.Tensor:
    """Return logits (rows, vocabulary) for one token of each of `rows` of the cache. ids and rows: (rows,) int64."""
    hidden = [forward(stack, ids[i : i + 1], cache, int(row)) for i, row in enumerate(rows)]
    return multiply(torch.cat(hidden), stack.head)


def multiply(x: torch.Tensor, part: Product) -> torch.Tensor:
    """(tokens, in_features) float32 -> (tokens, out_features) float32."""
    if part.int8:
        y = int8.forward(x, part.weight)
    elif isinstance(part.weight, QuantizedTensor):
        y = product_4bit.forward(x, part.weight)
    elif part.weight.dtype == torch.float32:
        y = x @ part.weight.t()
    else:
        y = panels.forward_unpacked(x, part.weight)  # widens a panel at a time
    return y if part.lora is None and part.bias is None else y + beside(x, part)


def beside(x: torch.Tensor, part: Product) -> torch.Tensor:
    """Return what stands beside a weight, for x (tokens, in_features): scaling (x A^T) B^T + bias, or one of the two.

    The shape is (tokens, out_features), or (out_features,) of a bias alone.
    """
    if part.lora is None:
        return part.bias.float()
    A, B, scaling = part.lora
    y = scaling * (x @ A.float().t()) @ B.float().t()  # (tokens, r) @ (r, out)
    return y if part.bias is None else y + part.bias.float()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x over the root mean square of its row, times a weight for each column. There is no mean to subtract."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.float()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn columns i and i + head_dim / 2 as a pair, by an angle for each position; x: (heads, tokens, head_dim).

    A product of two turned vectors then depends on how far their positions are apart.
    """
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """softmax(q keys^T / sqrt(head_dim)) values, where no token sees one behind it.

    q: (heads, tokens, head_dim), the last tokens of keys and values (key heads, all tokens, head_dim). Neighbouring
    heads of q share a head of keys. Returns (tokens, heads * head_dim).
    """
    tokens, total = q.shape[1], keys.shape[1]
    causal = tokens == total  # torch then leaves out what no token sees: half of the work
    # else token i sees total - tokens + i + 1
    visible = None if causal else torch.ones(tokens, total, dtype=torch.bool).tril(total - tokens)
    parts = q[None], keys[None], values[None]
    out = F.scaled_dot_product_attention(*parts, visible, is_causal=causal, enable_gqa=True)[0]
    return out.transpose(0, 1).reshape(tokens, -1)  # (tokens, heads * head_dim)


def gated(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)): one product decides, number by number, how much of the other passes."""
    return multiply(F.silu(multiply(x, layer.gate)) * multiply(x, layer.up), layer.down)


def by_heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(tokens, heads * head_dim) -> (heads, tokens, head_dim)."""
    return x.view(len(x), -1, head_dim).transpose(0, 1)  # (heads, tokens, head_dim)
