"""The loss of a language model on the answers of a batch, and on nothing else.

In: a causal model of transformers and a batch as data.collate makes it. Out: a summed cross entropy in nats, and over
how many tokens. Summed, not averaged, so that whoever adds up batches divides once, by all tokens.

Only rows that have a label go through the head: of a prompt of 150 tokens and an answer of 15 that is one in eleven,
and the head holds a fifth of SmolLM2's multiplications and, over a vocabulary of 49,152, most of its memory.
"""

import torch
from torch.nn.functional import cross_entropy

from qlora_lab.finetune.data import IGNORED, to_device


def answer_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """(sum of cross entropies, () float32 with its graph; number of labels) of a batch on any device."""
    batch = to_device(batch, model)
    targets = batch["labels"][:, 1:]  # position i predicts token i + 1: (batch, longest - 1)
    learned = targets != IGNORED
    # A hook and not a call of the decoder and the head in turn: some models scale or cap their logits after the head.
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :-1][learned],))
    try:
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        hook.remove()
    logits = output.logits.float()  # (n_learned, vocabulary)
    return cross_entropy(logits, targets[learned], reduction="sum"), int(learned.sum())
