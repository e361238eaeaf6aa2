"""Virtual tokens before every row: what prompt tuning and prefix tuning share.

In: a call of the model's decoder, as transformers makes it. Out: the same call, which sees `count` more tokens: the
attention mask gets as many ones in front, and positions begin `count` later. Logits, labels and the loss do not change
their shape, so nothing outside has to know.
"""

import inspect
from typing import Any

import torch
from torch import nn

from qlora_lab.adapters.adapter import Adapter
from qlora_lab.quant.numbers import check_seed, check_whole


class VirtualTokens(Adapter):
    """`count` learned tokens before each row. It is no part of the decoder, which calls it before each pass."""

    count: int

    def put_into(self, model: nn.Module, path: str) -> None:
        """Become the module `path` of `model`, and change the calls of its decoder from now on."""
        model.add_module(path, self.train(model.training))
        decoder = model.get_decoder()
        self._hooks = [
            decoder.register_forward_pre_hook(self.before, with_kwargs=True),
            decoder.register_forward_hook(self.after, with_kwargs=True),
        ]

    def take_out(self, model: nn.Module, path: str) -> None:
        """Leave the model, and its decoder's calls as they were."""
        for hook in self._hooks:
            hook.remove()
        delattr(model, path)

    def before(self, decoder: nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Change what the decoder is called with."""
        # by name, so that each argument can be changed whether it came by place or by name
        call = dict(zip(inspect.signature(decoder.forward).parameters, inputs, strict=False)) | named
        if call.get("inputs_embeds") is None:
            call["inputs_embeds"] = decoder.get_input_embeddings()(call.pop("input_ids"))
        call["input_ids"] = None  # a decoder takes one of the two
        mask = call.get("attention_mask")
        if mask is not None:
            if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
                raise ValueError(
                    f"{self.method} takes no mask of four dimensions, as a static cache makes: leave that out"
                )
            call["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.count), mask], dim=1)
        if call.get("position_ids") is not None:
            # computed for the words alone: the virtual tokens have the first places
            call["position_ids"] = call["position_ids"] + self.count
        cache = call.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:  # otherwise the virtual tokens are in it
            self.begin(decoder, call)
        elif call["inputs_embeds"].shape[1] > 1:  # transformers counts the virtual tokens of a returned cache as words
            raise ValueError(f"{self.method} cannot continue from a cache that was returned: begin from the text")
        return (), call

    def begin(self, decoder: nn.Module, call: dict[str, Any]) -> None:
        """Put the virtual tokens before a new row: change `call` in place."""
        raise NotImplementedError

    def after(self, decoder: nn.Module, inputs: tuple, named: dict[str, Any], output: Any) -> Any:
        """Change what the decoder returns."""
        return output


def virtual_tokens(model: nn.Module) -> int:
    """Count the virtual tokens before each row of `model`: 0 without an adapter that has some."""
    return sum(module.count for module in model.modules() if isinstance(module, VirtualTokens))


def check_virtual(model: nn.Module, tokens: int, seed: int) -> None:
    """Raise ValueError for a count of tokens that the model's context cannot hold."""
    check_whole("virtual_tokens", tokens)
    check_seed(seed)
    if not hasattr(model, "get_decoder"):
        raise ValueError(f"{type(model).__name__} has no decoder that virtual tokens can precede: use lora")
    config = model.config.get_text_config()
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        reason = "attention looks at the last tokens only, so it would lose virtual tokens"
        raise ValueError(f"{type(model).__name__} has a sliding window, in which {reason}: use lora")
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and tokens >= longest:
        raise ValueError(
            f"virtual_tokens is {tokens}, but the model reads at most {longest}: choose fewer, usually 10 to 100"
        )


def some_tokens(model: nn.Module, tokens: int, seed: int) -> torch.Tensor:
    """Draw (tokens,) ids of the vocabulary: real words are a better start than noise (Lester et al., section 3.2)."""
    vocabulary = len(model.get_input_embeddings().weight)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (tokens,), generator=generator).to(model.device)
