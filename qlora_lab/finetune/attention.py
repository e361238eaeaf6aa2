"""Attention in float32 for a bf16 model, on a CPU that multiplies float32 faster.

In: a model of transformers. Out: the same model; its queries, keys and values are widened for attention alone, and the
result rounded back. Everything else, what is kept for other layers too, stays as it was.

torch's attention multiplies what it is given. On a CPU whose bf16 products are slow (kernels/product.py races them) its
backward in bf16 takes three times as long as in float32 and is the largest part of a step after the weights' products.
The price: what attention keeps for backward is twice as large, 3 MiB a layer for SmolLM2-135M at 4 x 256 tokens.
"""

from typing import TYPE_CHECKING

import torch

from qlora_lab.kernels.product import race

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME, TORCH = "qlora_lab_float32", "sdpa"  # in transformers' table of attention functions


def widen_attention(model: "PreTrainedModel") -> bool:
    """Let `model` attend in float32 where that is faster: in bf16 or fp16, on the CPU, through torch's attention.

    Returns whether it now does.
    """
    narrow = model.dtype in (torch.bfloat16, torch.float16) and model.device.type == "cpu"
    can = getattr(model, "_can_set_attn_implementation", lambda: True)()
    if not (narrow and can) or model.config._attn_implementation not in (TORCH, NAME):
        return False
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _in_float32)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # booleans, which need no widening
    model.set_attn_implementation(TORCH if race().use_bfloat16 else NAME)
    return model.config._attn_implementation == NAME


def _in_float32(module, query, key, value, attention_mask, **options) -> tuple[torch.Tensor, None]:
    """transformers' function over torch's attention, (batch, heads, tokens, head_dim), called with wide tensors."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # One token looks at all keys once: widening them takes longer than narrow products do.
    if query.shape[2] == 1 or query.dtype not in (torch.bfloat16, torch.float16):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    wide = (tensor.float() for tensor in (query, key, value))
    attended, weights = sdpa_attention_forward(module, *wide, attention_mask, **options)
    return attended.to(query.dtype), weights
