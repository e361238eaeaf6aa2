"""Attention of a bf16 model on a CPU whose fast products are pairs of bf16: our kernel in place of torch's.

In: queries, keys and values (batch, heads, tokens, head_dim), as transformers hands them over. Out: what its function
for torch's attention returns. Source: kernels/attention.py. Kept for backward: the same tensors as torch keeps.

Calls that the kernel does not take go to torch: one token, dropout, a mask of numbers, a bias of positions, heads of
another size, and everything that torch.compile traces.
"""

import torch
from torch.autograd.function import once_differentiable

NAME = "qlora_lab_bfloat16"  # our name in transformers' table of attention functions


class _Attention(torch.autograd.Function):
    """Queries, keys and values (batch, tokens, heads, head_dim) -> the same layout as the queries."""

    @staticmethod
    def forward(ctx, query, key, value, mask: torch.Tensor | None, scale: float):
        from qlora_lab.kernels import attention

        out, kept = attention.forward(query, key, value, mask, scale)
        ctx.save_for_backward(query, key, value, out, kept)  # no scores: backward computes them again
        ctx.options = mask, scale  # the mask is shared by all layers
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        from qlora_lab.kernels import attention

        return *attention.backward(grad.contiguous(), ctx.saved_tensors, *ctx.options), None, None


def _takes(module, parts, mask: torch.Tensor | None, options: dict) -> bool:
    from qlora_lab.kernels.attention import can_attend

    query, key, value = parts
    batch, heads, tokens, head_dim = query.shape
    plain = all(tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" for tensor in parts)
    if torch.compiler.is_compiling() or tokens == 1 or not plain or key.shape != value.shape:
        return False
    if head_dim != key.shape[3] or heads % key.shape[1] or not can_attend(head_dim):
        return False
    if any(options.get(name) is not None for name in ("position_bias", "cache", "softcap")) or options.get("dropout"):
        return False
    keys = key.shape[2]
    if mask is None:  # as torch reads it; for queries that follow other tokens, transformers makes a mask
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        return causal and keys == tokens
    return mask.dtype == torch.bool and mask.shape[0] in (1, batch) and mask.shape[1:] == (1, tokens, keys)


def attend(module, query, key, value, attention_mask, **options):
    """Twin of transformers' sdpa_attention_forward: returns (batch, tokens, heads, head_dim) and None."""
    if not _takes(module, (query, key, value), attention_mask, options):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scaling = options.get("scaling")
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    # Most models made them with tokens before heads, and turned them: turned back they are contiguous, without a copy.
    query, key, value = (tensor.transpose(1, 2).contiguous() for tensor in (query, key, value))
    mask = None if attention_mask is None else attention_mask[:, 0]  # (batch or 1, tokens, keys)
    return _Attention.apply(query, key, value, mask, scale), None
