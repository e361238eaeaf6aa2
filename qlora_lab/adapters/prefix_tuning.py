"""Prefix tuning: learned keys and values before every row, in every layer.

    attention(q, [P_k; k], [P_v; v]),   P: (tokens, 2 layers, heads, head_dim)

With `mlp` they come from an MLP while they learn, P = W2 tanh(W1 e + b1) + b2 with e: (tokens, d); afterwards only P is
needed and stored.
Source: Li and Liang (arXiv 2101.00190) sections 4.2 and 4.3; the start from the activations of words: section 7.4.
"""

from typing import Any

import torch
from torch import nn

from qlora_lab.adapters.virtual_tokens import VirtualTokens, check_virtual, some_tokens
from qlora_lab.model.modes import measuring
from qlora_lab.quant.numbers import check_whole

PATH = "prefix"


class Prefix(VirtualTokens):
    """keys_and_values: (tokens, 2 layers, heads, head_dim), the start; keys of layer i are at 2 i. mlp: its width."""

    method = "prefix"

    def __init__(self, keys_and_values: torch.Tensor, mlp: int | None = None, seed: int = 0):
        super().__init__()
        self.count = len(keys_and_values)
        self.shape = keys_and_values.shape
        self.width = mlp
        # flat, as PEFT stores it
        flat = keys_and_values.float().flatten(1)  # (tokens, 2 layers x heads x head_dim)
        if mlp is None:
            self.prefix = nn.Parameter(flat.clone())
            return
        device = flat.device
        narrow = keys_and_values[0, 0].numel()  # heads x head_dim, as in PEFT
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            self.embedding = nn.Parameter(torch.randn(self.count, narrow, dtype=torch.float32).to(device))
            first = nn.Linear(narrow, mlp, dtype=torch.float32)
            second = nn.Linear(mlp, flat.shape[1], dtype=torch.float32)
        self.mlp = nn.Sequential(first, nn.Tanh(), second).to(device)

    @property
    def flat(self) -> torch.Tensor:
        """(tokens, 2 layers x heads x head_dim), float32."""
        return self.prefix if self.width is None else self.mlp(self.embedding)

    def begin(self, decoder: nn.Module, call: dict[str, Any]) -> None:
        from transformers import DynamicCache

        if decoder.training and getattr(decoder, "gradient_checkpointing", False):
            raise ValueError("prefix tuning cannot checkpoint gradients, which drops keys and values: switch it off")
        embedded = call["inputs_embeds"]  # (rows, length, d)
        if call.get("past_key_values") is None:
            # in training nobody passes one; it ends with this pass
            call["past_key_values"] = DynamicCache(config=decoder.config)
        parts = self.flat.to(embedded.dtype).view(self.shape).permute(1, 2, 0, 3)  # (2 layers, heads, tokens, head_dim)
        parts = parts.unsqueeze(1).expand(-1, len(embedded), -1, -1, -1)  # (2 layers, rows, heads, tokens, head_dim)
        # what each layer computes from the row is appended to this
        for layer in range(len(parts) // 2):
            call["past_key_values"].update(parts[2 * layer], parts[2 * layer + 1], layer)

    def after(self, decoder: nn.Module, inputs: tuple, named: dict[str, Any], output: Any) -> Any:
        if named.get("use_cache") is False and not isinstance(
            output, tuple
        ):  # the caller would take the prefix's own cache for one of its tokens
            output.past_key_values = None
        return output

    def settings(self) -> dict[str, int | None]:
        return {"virtual_tokens": self.count, "mlp": self.width}


def prefix(model: nn.Module, virtual_tokens: int = 20, mlp: int | None = None, *, seed: int = 0) -> dict[str, Prefix]:
    """Make `virtual_tokens` learned keys and values for the start of every row, in every layer of `model`.

    mlp: width of the MLP they come from in training; None: they learn directly, from the activations of words drawn
    from the vocabulary. Raises ValueError for more tokens than the context holds, and for a model whose layers do not
    all keep keys and values of one shape.
    """
    check_virtual(model, virtual_tokens, seed)
    if mlp is not None:
        check_whole("mlp", mlp)
    start = _activations(model, some_tokens(model, virtual_tokens, seed))
    return {PATH: Prefix(start, mlp, seed)}


def _activations(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Read `ids`, (tokens,), and return their keys and values: (tokens, 2 layers, heads, head_dim)."""
    with measuring(model):
        cache = model.get_decoder()(input_ids=ids[None], use_cache=True).past_key_values
    layers = getattr(cache, "layers", [])
    parts = [part for layer in layers for part in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    if not parts or any(part is None or part.shape != parts[0].shape for part in parts):
        raise ValueError(f"the layers of {type(model).__name__} keep no keys and values of one shape: use lora")
    return torch.stack([part[0] for part in parts]).permute(2, 0, 1, 3)  # each part is (1, heads, tokens, head_dim)
