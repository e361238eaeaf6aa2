"""Attention and the head of a bf16 model on a CPU: in float32 where that multiplies faster, else in pairs of bf16.

Queries, keys and values are widened for attention alone, and the result is rounded back; the head gives logits in
float32. All else stays as it was, including what other layers keep.

torch multiplies in the dtype that it gets. On a CPU with slow bf16 products (kernels/product.py races them) attention's
backward takes three times as long in bf16 as in float32, and the head's products twice as long.
The price: attention keeps twice as much for backward, 3 MiB more a layer for SmolLM2-135M at 4 x 256 tokens. The head
costs nothing: logits become float32 for the loss anyway, and its weight is widened a panel at a time.
Where bf16 is the fast type, the head is torch's, and attention is pair_attention.py's if the CPU has its instruction.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from qlora_lab.kernels import choose, product
from qlora_lab.kernels.words import has_pairs
from qlora_lab.model import pair_attention, product_ops

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NARROW = torch.bfloat16, torch.float16
NAME = "qlora_lab_float32"  # our name in transformers' table of attention functions
TORCH = "sdpa"  # torch's attention there
FEW = 48  # rows up to which widening the head's weight takes longer than it saves


def widen(model: "PreTrainedModel") -> bool:
    """Let a bf16 or fp16 model on the CPU compute attention and head in float32, if that is faster; else see above.

    Returns whether its attention is now wide. Attention other than torch's, and heads that are not plain, stay.
    """
    if model.dtype not in NARROW or model.device.type != "cpu":
        return False
    wide = not product.race().use_bfloat16  # measured once a process, about 0.1 s
    _widen_head(model, wide)
    return _widen_attention(model, wide)


def _widen_attention(model: "PreTrainedModel", wide: bool) -> bool:
    can = getattr(model, "_can_set_attn_implementation", lambda: True)()
    if not can or model.config._attn_implementation not in (TORCH, NAME, pair_attention.NAME):
        return False
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    for name, function in ((NAME, _in_float32), (pair_attention.NAME, pair_attention.attend)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)  # booleans, which need no widening
    in_pairs = model.dtype == torch.bfloat16 and has_pairs() and choose().product is not None
    model.set_attn_implementation(NAME if wide else pair_attention.NAME if in_pairs else TORCH)
    return wide


def _in_float32(module, query, key, value, attention_mask, **options) -> tuple[torch.Tensor, None]:
    """Call transformers' function for torch's attention with wide tensors, (batch, heads, tokens, head_dim)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # A single token reads all keys once: widening them takes longer than narrow products do.
    if query.shape[2] == 1 or query.dtype not in NARROW:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    wide = (tensor.float() for tensor in (query, key, value))
    attended, weights = sdpa_attention_forward(module, *wide, attention_mask, **options)
    return attended.to(query.dtype), weights  # other layers see no difference in dtype


class _Product(torch.autograd.Function):
    """x W^T in float32 for a frozen W. Keeps only W for backward."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.dtype = x.dtype  # of the gradient that goes back
        ctx.save_for_backward(weight)
        return product.forward_unpacked(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        return product.backward_unpacked(grad, *ctx.saved_tensors).to(ctx.dtype), None


class WideHead(nn.Linear):
    """A head without bias and with float32 logits; for many rows it also multiplies in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)  # (rows, in_features)
        frozen_and_narrow = not self.weight.requires_grad and x.dtype == self.weight.dtype and x.dtype in NARROW
        if len(rows) > FEW and frozen_and_narrow and x.device.type == "cpu":  # it may have been moved or cast
            multiply = product_ops.forward_wide if torch.compiler.is_compiling() else _Product.apply
            return multiply(rows, self.weight).view(*x.shape[:-1], self.out_features)
        return super().forward(x).float()


def _widen_head(model: "PreTrainedModel", wide: bool) -> None:
    head = model.get_output_embeddings()
    kind = WideHead if wide else nn.Linear
    if type(head) in (nn.Linear, WideHead) and type(head) is not kind and head.bias is None:
        new = kind(head.in_features, head.out_features, bias=False, device="meta")
        new.weight = head.weight  # the same Parameter, tied or not
        new.training = head.training
        model.set_output_embeddings(new)
