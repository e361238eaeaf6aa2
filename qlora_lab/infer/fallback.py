"""Answers of models that the decode path does not compute, by transformers' own `generate`.

In: prompts as ids, one after the other. Out: the same pieces that decode.py gives, a whole answer each.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from qlora_lab.data.dataset import end_token_id, to_device
from qlora_lab.infer.pieces import Pieces
from qlora_lab.infer.sampling import Sampling
from qlora_lab.model.modes import measuring, own_draws
from qlora_lab.train.limits import fill_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def generated(
    model: torch.nn.Module, tokenizer: "Tokenizer", ids: list[int], most: int, sampling: Sampling, new: list[int]
) -> None:
    """Write at most `most` ids that continue one prompt into `new`, while they come, without the one that ends them.

    Raises FloatingPointError for a NaN or an infinity: transformers would choose token 0, or fail while it draws.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList  # heavy, so not at the top

    stop = stop_ids(model, tokenizer)
    pieces = Pieces(tokenizer, sampling.stops, ids[-1])

    def watch(rows: torch.Tensor, _scores) -> torch.Tensor:
        new[:] = until(rows[0, len(ids) :].tolist(), stop)
        pieces.add(int(rows[0, -1]))
        return torch.tensor([pieces.stopped], dtype=torch.bool, device=rows.device)

    how = {"max_new_tokens": most, "eos_token_id": stop, "pad_token_id": fill_id(model, tokenizer)}
    how |= {"do_sample": sampling.temperature > 0, "repetition_penalty": float(sampling.repetition_penalty)}
    if sampling.temperature > 0:  # transformers warns of them beside greedy answers
        how |= {"temperature": float(sampling.temperature), "top_p": float(sampling.top_p), "top_k": 0}
    input_ids = torch.tensor([ids], dtype=torch.int64)
    batch = to_device({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}, model)
    with measuring(model), own_configuration_aside(model), own_draws(model):
        torch.manual_seed(sampling.seed)
        checks = LogitsProcessorList([_checked])
        watches = StoppingCriteriaList([watch])
        config = GenerationConfig(**how)
        model.generate(**batch, generation_config=config, logits_processor=checks, stopping_criteria=watches)


def _checked(_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    if not (logits < torch.inf).all():  # a processor may have set some to -inf
        raise FloatingPointError("the model computes a logit that is not a finite number")
    return logits


@contextmanager
def own_configuration_aside(model: torch.nn.Module) -> Iterator[None]:
    """Make `generate` follow the configuration that it is passed, and nothing else.

    transformers fills unset fields from the model's own configuration, which may sample, punish repetitions, suppress
    tokens or search beams. Passing a neutral value for each field would miss those whose neutral value is None, and the
    fields of later versions. So an empty configuration replaces the model's own for a while.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def stop_ids(model: torch.nn.Module, tokenizer: "Tokenizer") -> list[int]:
    """Collect the template's end token and the model's own end tokens (one id, several, or none)."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]  # None becomes [None], which is removed
    template = [end_token_id(tokenizer)] if tokenizer.chat_template else []  # a base model may have none
    return sorted({*template, *own} - {None})


def until(row: list[int], stop: list[int]) -> list[int]:
    """Cut the row before the first token that ends it. Only padding follows, of any token."""
    return row[: next((i for i, token in enumerate(row) if token in stop), len(row))]
