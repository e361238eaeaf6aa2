"""Hand a stack to the kernel that computes a token in one call (kernels/decode_step.py), where it can.

In: a Stack. Out: a function with the signature of step.step without the stack, equal to it within rounding. One token
of a row reads every weight once: the time to read them is the floor.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from time import perf_counter

import torch

from qlora_lab.infer import int8, step as readable
from qlora_lab.infer.cache import Cache
from qlora_lab.infer.stack import Product, Stack
from qlora_lab.infer.thread_choice import ThreadChoice
from qlora_lab.kernels import choose
from qlora_lab.model import product_4bit
from qlora_lab.quant.codebook import codebook, rounding
from qlora_lab.quant.quantize import QuantizedTensor

try:
    import resource
except ImportError:  # Windows
    resource = None

Step = Callable[[torch.Tensor, Cache, torch.Tensor], torch.Tensor]


def step_of(stack: Stack, in_int8: bool = False) -> Step:
    """Return the kernel's step, or the readable one for sizes and code tables that the kernel does not take.

    in_int8: all but a text's first token pass layers that compute in int8, as in read_prompt.
    """
    if in_int8:
        return _after_the_first(stack)
    return FastStep(stack) if can_step(stack) else partial(readable.step, stack)


def _after_the_first(stack: Stack) -> Step:
    """Return a step in int8 for tokens that are not their text's first, and in float32 for those that are."""
    rounded = step_of(int8.with_int8(stack))

    def step(ids: torch.Tensor, cache: Cache, rows: torch.Tensor) -> torch.Tensor:
        first = cache.lengths[rows] == 0  # (rows,)
        if not first.any():
            return rounded(ids, cache, rows)
        logits = torch.empty(len(ids), stack.head.weight.shape[0], dtype=torch.float32)
        # only a prompt of one token gets here, so the second table of weights is not kept
        for mine, its in ((first, step_of(stack)), (~first, rounded)):
            if mine.any():
                logits[mine] = its(ids[mine], cache, rows[mine])
        return logits

    return step


def can_step(stack: Stack) -> bool:
    """Whether the kernel computes this stack: sizes of whole registers, 4-bit codes in blocks that end with rows."""
    if choose().blocks is None:  # switched off, or a forked process: 16-bit weights need them, too
        return False
    from qlora_lab.kernels import decode_step, prompt_attention

    hidden = stack.embedding.shape[1]
    middle = stack.layers[0].gate.weight.shape[0]
    if not decode_step.can_step(hidden, stack.head_dim, middle) or not prompt_attention.can_attend(stack.head_dim):
        return False
    return all(_fits(part) for layer in stack.layers for part in layer.products) and _fits(stack.head)


def _fits(part: Product) -> bool:
    from qlora_lab.kernels import decode_int8, few_tokens

    if not isinstance(part.weight, QuantizedTensor):
        return part.weight.is_contiguous()
    known = product_4bit.product_of(part.weight) is not None
    if part.int8 and not decode_int8.can_multiply(part.weight.shape[1], part.weight.block_size):
        return False
    return known and few_tokens.can_multiply(part.weight.shape[1], part.weight.plain)


def bytes_read(stack: Stack) -> int:
    """Bytes of weights and adapters that one token reads, whatever its position. Keys and values come on top."""
    parts = [part for layer in stack.layers for part in layer.products] + [stack.head]
    return sum(part.weight.nbytes + sum(t.nbytes for t in (part.lora or ())[:2]) for part in parts)


def read_token(stack: Stack, ids: torch.Tensor, cache: Cache, row: int = 0) -> None:
    """Put keys and values of one token, ids (1,), into `row` of the cache, as prompt.forward does for several.

    All layers are one call: of SmolLM2-135M 11 ms on a core, with the table of weights, where 210 calls take 27.
    """
    # The table of weights is made anew for each prompt: one that is kept could be that of weights before a training.
    x, _ = FastStep(stack, head=False).both(ids, cache, torch.tensor([row], dtype=torch.int64))
    if not x.isfinite().all():
        cache.lengths[row] -= 1
        readable.forward(stack, ids, cache, row)  # names the layer


class FastStep:
    """The kernel's step over one stack. Keeps all tensors whose addresses it passes.

    head: False for a step that leaves keys and values, and has no logits.
    """

    def __init__(self, stack: Stack, head: bool = True):
        from qlora_lab.kernels import decode_products, decode_step
        from qlora_lab.kernels.compiled import thread_count

        self._stack = stack
        self._kept: list[torch.Tensor] = []
        layers = decode_products.table([[self._described(part) for part in layer.products] for layer in stack.layers])
        last = decode_products.table([self._described(stack.head)] if head else [])
        pairs = ((layer.attention_norm, layer.mlp_norm) for layer in stack.layers)
        norms = [norm for pair in pairs for norm in pair] + [stack.norm]
        self._weights = decode_step.Weights(layers, torch.stack(norms).float().numpy(), last)
        self._thresholds, _ = rounding(codebook("int8"))
        self._step = decode_step.step
        # by number of rows: each number has a kernel and a time of its own
        self._threads = defaultdict(partial(ThreadChoice, thread_count()))

    def __call__(self, ids: torch.Tensor, cache: Cache, rows: torch.Tensor) -> torch.Tensor:
        """Return logits (rows, vocabulary) float32, as step.step does. Raises ValueError where the cache is full."""
        return self.both(ids, cache, rows)[1]

    def both(self, ids: torch.Tensor, cache: Cache, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the layers leave, (rows, hidden) float32, and the logits."""
        cache.check_room(rows, 1)
        positions = cache.lengths[rows]  # where the new token of each row belongs
        stack = self._stack
        x = stack.embedding[ids].float()  # (rows, hidden)
        read = stack.eps, stack.heads, (cache.cos, cache.sin), cache.kept
        threads = self._threads[len(rows)]
        start, switches = perf_counter(), _switches()
        logits = self._step(x, self._weights, *read, rows, positions, self._thresholds, threads.count)
        threads.took(perf_counter() - start, _switches() - switches)
        cache.lengths[rows] = positions + 1
        return x, logits

    def _described(self, part: Product):
        from qlora_lab.kernels import decode_products

        weight = part.weight.plain if isinstance(part.weight, QuantizedTensor) else part.weight
        # once for an answer, so that a token finds float32
        bias = None if part.bias is None else part.bias.float().contiguous()
        lora = part.lora and (*(factor.float().contiguous() for factor in part.lora[:2]), part.lora[2])
        whole = int8.round_levels(part.weight.levels) if part.int8 else None
        described, kept = decode_products.describe(weight, part.weight.shape, bias, lora, whole)
        self._kept.append(kept)  # a table holds addresses, which keep nothing alive
        return described


def _switches() -> int:
    """How often the system has taken a core away from a thread of this process; 0 on Windows, which does not tell."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0
