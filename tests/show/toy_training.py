"""A run of a LLaMA of one layer, made on the spot: for the tests, their kernels and their browser."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_lab.adapters.lora import add_lora
from qlora_lab.data.examples import Example
from qlora_lab.train.settings import Settings
from qlora_lab.train.trainer import Training

ROLES = ["<|user|>", "<|assistant|>"]
WORDS = ["one", "two", "three", "four", "five", "six"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|> ' + m.content + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)
EXAMPLES = [Example((("user", " ".join(WORDS[: i + 1])), ("assistant", WORDS[i]))) for i in range(6)]  # counting


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Each word is a token."""
    ids = {word: number for number, word in enumerate(["<|end|>", *ROLES, *WORDS])}
    words = Tokenizer(models.WordLevel(ids, unk_token="<|end|>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|end|>", extra_special_tokens=ROLES, chat_template=TEMPLATE
    )


def toy_training(out: str | Path, steps: int = 6, **options) -> Training:
    """Always the same one. options: fields of Settings, and what else Training takes."""
    names = {name: options.pop(name) for name in ("held_out", "resume", "overwrite") if name in options}
    tokenizer = toy_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = add_lora(LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)), r=4)
    settings = Settings(steps=steps, **{"batch_size": 4, "max_length": 16, "lr": 1e-2, **options})
    return Training(model, tokenizer, EXAMPLES, out, settings, progress=False, **names)
