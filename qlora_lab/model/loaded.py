"""Name what was given in place of a model or a tokenizer, before a deeper line fails on it.

The usual slips: a name instead of what `load` returns for it, and the pair that `load` returns instead of the model.
"""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

ADVICE = "give what load returns, model, tokenizer = qlora_lab.load(...)"


def check_model(model: nn.Module) -> None:
    """Raise TypeError for anything but a module of torch."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r:.60}, not a model: {ADVICE}")


def check_pair(model: nn.Module, tokenizer: "Tokenizer") -> None:
    """Raise TypeError for a model that has no embedding of tokens, and for what is no tokenizer."""
    check_model(model)
    if not hasattr(model, "get_input_embeddings"):
        raise TypeError(f"model is a {type(model).__name__}, not a language model of transformers: {ADVICE}")
    # tests and users have tokenizers of many makers, but all are called
    if not callable(tokenizer) or isinstance(tokenizer, nn.Module):
        raise TypeError(f"tokenizer is {tokenizer!r:.60}, not a tokenizer of transformers: {ADVICE}")
