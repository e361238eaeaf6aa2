"""QLoRA training on one screen: the readable twin of trainer.py.

In: a model with adapters, its tokenizer, examples. Out: trained adapters, and a line of the log per step.
Source: QLoRA section 4 and appendix B: AdamW, constant learning rate 2e-4, gradient norm clipped at 0.3.

At default settings the trainer computes the same bits; a test compares them.
Not here: checkpoints, evaluations, LoRA+, last_answer_only, packing, micro-batches, float16, more than one process
(trainer.py has them).
"""

import numpy as np
import torch

from qlora_lab.data.batches import Batches
from qlora_lab.data.dataset import collate, encode_all
from qlora_lab.data.examples import Example
from qlora_lab.model.modes import mode, own_draws
from qlora_lab.optim.paged_adamw import PagedAdamW
from qlora_lab.train.limits import fill_id
from qlora_lab.train.loss import answer_loss
from qlora_lab.train.settings import Settings, learning_rate


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Return the seed for what process `rank` draws in a step.

    It depends on nothing drawn before, so a resumed run draws the same.
    """
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def shuffled(examples: list, seed: int) -> list:
    """Return the examples in random order, so that the first few are a fair sample."""
    order = np.random.default_rng(seed).permutation(len(examples))
    return [examples[i] for i in order]


def train(model, tokenizer, examples: list[Example], settings: Settings) -> list:
    """Train the adapters of `model` on the answers of `examples`. Returns the log."""
    # Shuffle first, so that the examples a short run needs are a fair sample of all.
    examples = shuffled(examples, settings.seed)
    needed = settings.steps * settings.batch_size
    # Longer examples are left out, not cut: a cut answer would lose its end token.
    encoded, _ = encode_all(examples, tokenizer, settings.max_length, needed, False)
    batches = Batches(len(encoded), settings.batch_size, settings.seed)
    pad_id = fill_id(model, tokenizer)
    # Only lora_A and lora_B: the 4-bit weights are frozen and get no gradient.
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Weight decay would pull the product B A towards zero, not the weight. The paper's
    # optimizer is paged; without a budget it gives the bits of torch.optim.AdamW,
    # which the trainer uses then.
    optimizer = PagedAdamW(parameters, lr=settings.lr, weight_decay=0.0)
    log = []
    # Training mode switches dropout on; the caller's mode and random state come back.
    with mode(model, training=True), own_draws(model):
        for step in range(1, settings.steps + 1):
            torch.manual_seed(step_seed(settings.seed, step))  # for dropout
            # Pad to the longest example of the batch and no further.
            rows = [encoded[i] for i in next(batches)]
            batch = collate(rows, pad_id)  # (batch, longest)
            # Forward: decode each 4-bit weight, multiply, and add the adapter's part.
            # The prompt is read but not judged: the sum is over answer tokens alone.
            summed, answer_tokens = answer_loss(model, batch)  # nats, a count
            # Divide once: each token counts the same, in a long answer or a short one.
            loss = summed / answer_tokens
            # Backward: decode the weights again; gradients go through, not into, them.
            loss.backward()
            # One odd batch must not undo the others: shorten a gradient above `clip`.
            norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step)  # warm-up, then schedule
            optimizer.step()
            # PyTorch adds gradients up; the next step must begin without these.
            optimizer.zero_grad()
            line = {"step": step, "loss": loss.item(), "gradient_norm": norm.item()}
            log.append(line)
    return log
