"""What goes wrong silently in a training run: each check looks for one of it, and names users who met it.

In: a model, encoded examples, batches. Out: a Finding, "ok", "warning" or "problem".
Source: the threads in THREADS. A check runs the real thing on real examples and compares; none reads settings.

    tokens:  end_tokens, learned_tokens, left_out, new_tokens        weights:  trained_share, memory
    data:    asked_for, texts (data_checks.py)                       rows:     row_lengths
    steps:   finite_values, live_adapters, accumulation, packed_rows

Parameters, gradients, training flags and the random state are left as they were.
Not here: which checks run on what (diagnose.py).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from qlora_lab.adapters.lora import adapters
from qlora_lab.data.dataset import IGNORED, Encoded, EncodeReport, collate, pad_token_id
from qlora_lab.data.labels import end_token_id
from qlora_lab.doctor.dtype_policy import GRADIENTS, MOMENTS, OTHER_TRAINED, DtypePolicy
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.model.modes import checkpointing, mode, own_draws
from qlora_lab.train.limits import position_limit, too_long, unknown_token, used_tokens
from qlora_lab.train.loss import accumulate, answer_loss
from qlora_lab.train.nonfinite import first_nonfinite
from qlora_lab.train.packed_rows import packing_fault
from qlora_lab.train.rounding import tolerance
from qlora_lab.train.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Batch = dict[str, torch.Tensor]
LEFT_OUT = 0.5  # share of examples: if more are too long, the rest is no longer the user's data
TIGHT = 0.75  # share of the free memory: a step of SmolLM2 on 2,040 tokens peaked at 1.27 times what it keeps
HALF_SCALE = 1024  # of the loss in float16, whose least number is 6e-8; the trainer looks for its own
BLANK = 0.01  # of the usual size: an embedding that is nearer to zero, or to the mean of all, was never trained

END, LEARNED, LENGTH, NEW = "end token in labels", "learned tokens", "examples left out", "new tokens"
ASKED, TEXTS = "turns and fields", "texts under the template"
FINITE, LIVE, ACCUMULATION = "finite values", "adapters learn", "gradient accumulation"
CHECKPOINTED, SHARE, MEMORY = f"{LIVE} with gradient checkpointing", "trained share", "memory"
POSITIONS, PACKED = "row lengths", "packed rows"
THREADS = {  # on github.com
    END: ("huggingface/trl/issues/696", "unslothai/unsloth/issues/416"),
    LEARNED: ("mlabonne/llm-course/issues/33", "huggingface/blog/issues/1302"),
    LENGTH: ("huggingface/trl/pull/6025",),
    ASKED: ("axolotl-ai-cloud/axolotl/pull/1703", "NVIDIA-NeMo/Automodel/issues/3143"),
    TEXTS: ("huggingface/transformers/issues/29279", "modelscope/ms-swift/issues/4939"),
    NEW: ("artidoro/qlora/issues/214", "huggingface/peft/issues/2368"),
    FINITE: ("huggingface/trl/issues/618", "hiyouga/LlamaFactory/issues/3353"),
    LIVE: ("huggingface/peft/issues/137", "locuslab/open-unlearning/issues/178"),
    CHECKPOINTED: ("huggingface/peft/issues/1142", "huggingface/transformers/issues/42489"),
    ACCUMULATION: ("huggingface/transformers/pull/34191", "huggingface/trl/issues/2175"),
    SHARE: ("huggingface/peft/pull/733", "artidoro/qlora/issues/260"),
    POSITIONS: ("huggingface/transformers/issues/6559", "huggingface/transformers/issues/3902"),
    PACKED: ("huggingface/trl/issues/1230", "hiyouga/LlamaFactory/issues/2289"),
    MEMORY: ("bitsandbytes-foundation/bitsandbytes/issues/1569", "huggingface/peft/issues/1149"),
}
Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """What one check found. threads: addresses of users' reports that it answers."""

    name: str
    status: Status
    message: str
    threads: tuple[str, ...]


# -------------------------------------------------------------------------------------------------------------- tokens


def end_tokens(encoded: list[Encoded], tokenizer: "Tokenizer") -> Finding:
    """Whether every example, in a batch, teaches the token that ends an answer, also where it is the pad token."""
    end, pad = end_token_id(tokenizer), pad_token_id(tokenizer)
    batch = collate(encoded, 0 if pad is None else pad)
    text, of = tokenizer.decode([end]), f"of {len(encoded)} examples"
    masked = batch["attention_mask"].sum(1) != torch.tensor([len(one.input_ids) for one in encoded])  # (examples,)
    if masked.any():
        return _finding(END, "problem", f"padding is masked by its id, and with it real tokens in {masked.sum()} {of}")
    lacking = (~(batch["labels"] == end).any(1)).nonzero().flatten().tolist()  # padding is no label, so it cannot help
    if lacking:
        begins = tokenizer.decode(encoded[lacking[0]].input_ids[:16])
        what = f"{text} is not among the labels in {len(lacking)} {of}; the first begins {begins!r}"
        return _finding(END, "problem", f"{what}. A model that never learns it never stops")
    same = "; it is the pad token as well, and padding is masked by position" if end == pad else ""
    return _finding(END, "ok", f"{text} in {len(encoded)} {of}{same}")


def learned_tokens(encoded: list[Encoded]) -> Finding:
    """How many tokens are learned, and whether any prompt is."""
    asked, tokens = sum(one.answer_tokens for one in encoded), sum(len(one.input_ids) for one in encoded)
    silent = sum(one.answer_tokens == 0 for one in encoded)
    whole = sum(one.answer_tokens >= len(one.input_ids) - 1 for one in encoded)  # the first token is never predicted
    moved = sum(any(x not in (y, IGNORED) for x, y in zip(one.labels, one.input_ids, strict=True)) for one in encoded)
    if moved:
        message = f"{moved} of {len(encoded)} examples have labels that are not their tokens: models shift them by one"
        return _finding(LEARNED, "problem", f"{message} themselves, so give each token its own")
    if silent:
        return _finding(LEARNED, "problem", f"{silent} of {len(encoded)} examples have no label: nothing to learn")
    if whole:
        return _finding(LEARNED, "warning", f"{whole} of {len(encoded)} examples teach their prompt too: mask it")
    share = asked / tokens
    return _finding(LEARNED, "ok", f"{asked:,} of {tokens:,}, {share:.0%}; the others are prompts, and masked")


def left_out(counts: EncodeReport, max_length: int) -> Finding:
    """How many examples are longer than `max_length`, and so left out."""
    seen, limit = counts.kept + counts.too_long, f"more than {max_length} tokens"
    message = f"{counts.too_long} of {seen} have {limit}, the longest {counts.longest}"
    if counts.too_long > LEFT_OUT * seen:
        return _finding(LENGTH, "warning", f"{message}: most of the data is never seen, allow longer ones")
    return _finding(LENGTH, "ok", message)


def new_tokens(model: nn.Module, tokenizer: "Tokenizer", encoded: list[Encoded]) -> Finding:
    """Whether every token has an embedding, and one that was trained.

    New rows that were drawn at random, and not zero or near the mean, cannot be told from trained ones.
    """
    weight = model.get_input_embeddings().weight  # (rows, hidden)
    used = sorted(used_tokens(encoded))
    if fault := unknown_token(model, tokenizer, used):
        return _finding(NEW, "problem", fault)
    if fault := unknown_token(model, tokenizer, range(len(tokenizer))):
        return _finding(NEW, "warning", fault)
    blank = [] if weight.requires_grad else [used[i] for i in _blank(weight.detach(), used)]
    if blank:
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(blank[:3])))
        message = (
            f"{len(blank)} of {len(used)} tokens in use, {names}, have an embedding that was never trained, and it is "
            "frozen: a template of trained tokens, or training the embedding, would make them differ"
        )
        return _finding(NEW, "warning", message)
    return _finding(NEW, "ok", f"none: all {len(used):,} in use have a trained row among {len(weight):,}")


def row_lengths(model: nn.Module, encoded: list[Encoded]) -> Finding:
    """Whether the model has a position for each token of the longest example."""
    longest, limit = max(len(one.input_ids) for one in encoded), position_limit(model)
    if fault := too_long(model, longest):
        status, reason = fault
        return _finding(POSITIONS, status, f"an example has {longest} tokens, but {reason}: take a lower max_length")
    made_for = "any length" if limit is None else f"{limit}"
    return _finding(POSITIONS, "ok", f"at most {longest} tokens; the model was made for {made_for}")


def _blank(weight: torch.Tensor, used: list[int]) -> list[int]:
    """Positions in `used` of rows that are zero, or the mean of all: so do libraries start new ones."""
    rows = weight[used].float()  # (used, hidden)
    size, distance = rows.norm(dim=1), (rows - weight.mean(0, dtype=torch.float32)).norm(dim=1)  # (used,)
    blank = (size < BLANK * size.median()) | (distance < BLANK * distance.median())
    return blank.nonzero().flatten().tolist()


# --------------------------------------------------------------------------------------------------------------- steps


def finite_values(model: nn.Module, batch: Batch) -> Finding:
    """Whether every parameter, activation and gradient of a step is finite."""
    with mode(model, training=True):
        found = first_nonfinite(model, batch)
    if found:
        return _finding(FINITE, "problem", str(found))
    return _finding(FINITE, "ok", "parameters, activations and gradients of a step")


def live_adapters(model: nn.Module, batch: Batch, name: str = LIVE) -> Finding:
    """Whether one step of AdamW moves every lora_B, and nothing that is frozen."""
    frozen = _checksums(model)
    with _borrowed(model, training=True) as trained:
        before = {path: layer.lora_B.clone() for path, layer in adapters(model).items()}
        _accumulate(model, [batch])
        if trained:
            torch.optim.AdamW(trained, lr=Settings.lr).step()
        dead = [path for path, layer in adapters(model).items() if torch.equal(layer.lora_B, before[path])]
    changed = [key for key, value in _checksums(model).items() if frozen[key] != value]
    if changed:
        return _finding(name, "problem", f"a step changed {_some(changed)} of the base, which is frozen")
    if dead:
        message = f"{len(dead)} of {len(before)} do not move in a step, their gradient is missing or 0: {_some(dead)}"
        return _finding(name, "problem", message)
    return _finding(name, "ok", f"one step moves all {len(before)}, and none of {len(frozen)} tensors of the base")


def accumulation(
    model: nn.Module,
    examples: list[Encoded],
    pad_id: int,
    accumulate: Callable[[nn.Module, list[Batch]], None] | None = None,
) -> Finding:
    """Whether a batch at once and one example after another give the same gradients.

    accumulate: a loop of your own, which adds the gradients of batches up in `.grad`; None for this library's.
    They differ by rounding only: see `tolerance`.
    """
    if len(examples) < 2:
        return _finding(ACCUMULATION, "warning", "not checked: one example is too few to compare")
    runs = []
    for parts in ([examples], [[one] for one in examples]):
        with _borrowed(model, training=False) as trained:  # without dropout, which would draw differently
            (accumulate or _accumulate)(model, [collate(part, pad_id) for part in parts])
            gradients = [p.grad.flatten().double() for p in trained if p.grad is not None]
            runs.append(torch.cat(gradients) if gradients else torch.zeros(1))  # (trained elements,)
    once, added = runs
    if not once.any():
        return _finding(ACCUMULATION, "problem", "there is no gradient at all")
    difference, allowed = ((once - added).norm() / once.norm()).item(), tolerance(model)
    message = f"{len(examples)} at once and {len(examples)} times 1 differ by {difference:.1e} of the gradient"
    if difference <= allowed:
        return _finding(ACCUMULATION, "ok", f"{message}, rounding is up to {allowed:.1e}")
    advice = "divide by the answer tokens of the whole batch, once"
    return _finding(ACCUMULATION, "problem", f"{message}, rounding only up to {allowed:.1e}: {advice}")


def packed_rows(model: nn.Module, examples: list[Encoded], asked: bool) -> Finding:
    """Whether examples in one row stay apart in this model; a problem only if packing is `asked` for."""
    fault = packing_fault(model, examples[0], examples[-1])
    if fault is None:
        return _finding(PACKED, "ok", "examples in one row stay apart: packing may be used")
    return _finding(PACKED, "problem" if asked else "ok", f"packing must be left off: {fault}")


def _accumulate(model: nn.Module, batches: list[Batch]) -> None:
    """As a step of the trainer does; in float16 on a scaled loss, without which small gradients vanish."""
    tokens = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
    factor = HALF_SCALE if getattr(model, "dtype", None) == torch.float16 else 1
    accumulate(model, batches, max(tokens, 1), lambda loss: loss * factor)
    for p in model.parameters():
        if p.grad is not None:
            p.grad /= factor


@contextmanager
def _borrowed(model: nn.Module, training: bool) -> Iterator[list[nn.Parameter]]:
    """The parameters that train, as copies without gradients: a step on them leaves nothing behind."""
    kept = [(p, p.data, p.grad) for p in model.parameters()]
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        with mode(model, training=training), own_draws(model), torch.enable_grad():
            for p, _, _ in kept:
                p.grad = None
            for p in trained:
                p.data = p.data.clone()
            yield trained
    finally:
        for p, data, grad in kept:
            p.data, p.grad = data, grad


def _checksums(model: nn.Module) -> dict[str, int]:
    """Name -> sum of bytes, of everything that is not trained: a copy of a large model would not fit beside it."""
    tensors = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    for path, module in model.named_modules():
        if isinstance(module, Linear4bit):
            tensors |= {f"{path}.weight.packed": module.weight.packed, f"{path}.weight.absmax": module.weight.absmax}
    return {name: int(t.reshape(-1).view(torch.uint8).sum()) for name, t in tensors.items()}


# ------------------------------------------------------------------------------------------------------------- weights


def trained_share(policy: DtypePolicy) -> Finding:
    """How much of the model trains, and whether anything but adapters does."""
    message = f"{policy.trained:,} of {policy.weights:,} weights, {policy.share:.2%}"
    if policy.stored != policy.weights:
        message += f" (counting packed bytes as weights would say {policy.trained / policy.stored:.2%})"
    others = sum(row.elements for row in policy.rows if row.what == OTHER_TRAINED)
    if others:
        return _finding(SHARE, "warning", f"{message}; {others:,} of them are no adapter's, and are not saved with it")
    return _finding(SHARE, "ok", message)


def memory(policy: DtypePolicy, full: int, checkpointed: int, free: int | None, tokens: int) -> Finding:
    """Whether gradients, moments and activations fit beside the weights, which are there already.

    full, checkpointed: bytes of activations for `tokens` tokens at once, without and with gradient checkpointing.
    """
    extra = sum(row.nbytes for row in policy.rows if row.what in (GRADIENTS, MOMENTS))
    message = (
        f"{_mib(extra)} of gradients and moments, {_mib(full)} of activations for {tokens:,} tokens at once "
        f"({_mib(checkpointed)} with gradient checkpointing; measured on short examples and scaled)"
    )
    if free is None:
        return _finding(MEMORY, "ok", f"{message}; this system does not say how much is free")
    message += f"; {_mib(free)} are free"
    if extra + checkpointed > free:
        return _finding(MEMORY, "problem", f"{message}: take fewer examples at once, shorter ones, or 8-bit moments")
    if extra + full > free:
        return _finding(MEMORY, "problem", f"{message}: switch gradient checkpointing on, or take fewer at once")
    status = "warning" if extra + full > TIGHT * free else "ok"
    return _finding(MEMORY, status, f"{message}{', which is tight' if status == 'warning' else ''}")


def activations(model: nn.Module, batch: Batch, tokens: int) -> tuple[int, int]:
    """Bytes kept for the backward pass of `tokens` tokens, without and with gradient checkpointing."""
    full = _kept(model, batch)
    with checkpointing(model):
        # and one layer, which is computed again in the backward pass
        less = _kept(model, batch) + full // max(1, getattr(model.config, "num_hidden_layers", 1))
    measured = batch["input_ids"].numel()
    return full * tokens // measured, min(full, less) * tokens // measured


def _kept(model: nn.Module, batch: Batch) -> int:
    """Bytes of all tensors that a forward pass keeps for its backward pass, weights not counted, each storage once."""
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        _borrowed(model, training=True),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        loss = answer_loss(model, batch)[0]  # while it lives, so does what it keeps, and no address is used twice
        size = sum(nbytes for address, nbytes in kept.items() if address not in weights)
        del loss
    return size


# ------------------------------------------------------------------------------------------------------------- helpers


def _finding(name: str, status: Status, message: str) -> Finding:
    return Finding(name, status, message, tuple(f"https://github.com/{thread}" for thread in THREADS[name]))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"
