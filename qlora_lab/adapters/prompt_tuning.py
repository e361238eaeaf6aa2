"""Prompt tuning: learned vectors in front of the embeddings of every row.

    decoder([P; E(x)]),   P: (tokens, d)

Source: Lester et al. (arXiv 2104.08691) section 2; the start from a text or from words of the vocabulary: section 3.2.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_lab.adapters.virtual_tokens import VirtualTokens, check_virtual, some_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PATH = "soft_prompt"


class SoftPrompt(VirtualTokens):
    """prompt: (tokens, d), the vectors at the start."""

    method = "prompt"

    def __init__(self, prompt: torch.Tensor):
        super().__init__()
        self.prompt = nn.Parameter(prompt.float().clone())
        self._added = 0  # vectors in front of the current pass

    @property
    def count(self) -> int:
        return len(self.prompt)

    def before(self, decoder: nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self._added = 0
        return super().before(decoder, inputs, named)

    def begin(self, decoder: nn.Module, call: dict[str, Any]) -> None:
        embedded = call["inputs_embeds"]  # (rows, length, d)
        prompt = self.prompt.to(embedded.dtype).expand(len(embedded), -1, -1)
        call["inputs_embeds"] = torch.cat([prompt, embedded], dim=1)
        if (positions := call.get("position_ids")) is not None:  # (rows, length), from `count` on
            first = torch.arange(self.count, device=positions.device).expand(len(positions), -1)
            call["position_ids"] = torch.cat([first, positions], dim=1)
        self._added = self.count

    def after(self, decoder: nn.Module, inputs: tuple, named: dict[str, Any], output: Any) -> Any:
        if isinstance(output, tuple):  # return_dict=False
            return output[0][:, self._added :], *output[1:]
        output.last_hidden_state = output.last_hidden_state[:, self._added :]  # (rows, length, d)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(states[:, self._added :] for states in output.hidden_states)
        return output

    def settings(self) -> dict[str, int]:
        return {"virtual_tokens": self.count}


def prompt(
    model: nn.Module,
    virtual_tokens: int = 20,
    start: str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    seed: int = 0,
) -> dict[str, SoftPrompt]:
    """Make `virtual_tokens` learned vectors for the start of every row that `model` reads.

    start: a text; the vectors start as its embeddings, repeated or cut, which needs the tokenizer. None: as
    words drawn from the vocabulary. Raises ValueError for more tokens than the context holds, or a text without a
    token.
    """
    check_virtual(model, virtual_tokens, seed)
    if start is None:
        ids = some_tokens(model, virtual_tokens, seed)
    else:
        if tokenizer is None:
            raise ValueError("start needs the model's tokenizer: pass tokenizer=, or leave out start")
        words = tokenizer(start, add_special_tokens=False)["input_ids"]
        if not words:
            raise ValueError("start has no token: give some words, such as the task's description")
        words = (words * -(-virtual_tokens // len(words)))[:virtual_tokens]
        ids = torch.tensor(words, dtype=torch.int64, device=model.device)
    with torch.no_grad():
        words = model.get_input_embeddings()(ids)
    return {PATH: SoftPrompt(words)}
