"""Checks for failures of a training run that raise no error; each names reports of users who had that failure.

Source: the threads in THREADS. A check runs the real model on real examples and compares; none reads settings.

A check restores parameters, gradients, training flags and the random state.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from qlora_lab.adapters.adapter import Adapter, adapters, method_of
from qlora_lab.data.dataset import IGNORED, Encoded, EncodeReport, collate, pad_token_id
from qlora_lab.data.labels import end_token_id
from qlora_lab.doctor.dtype_policy import COPIES, GRADIENTS, MOMENTS, OTHER_TRAINED, DtypePolicy
from qlora_lab.model.modes import checkpointing, mode, own_draws
from qlora_lab.model.packed_module import PackedModule
from qlora_lab.train.limits import position_limit, too_long, unknown_token, used_tokens
from qlora_lab.train.loss import accumulate, answer_loss
from qlora_lab.train.nonfinite import first_nonfinite
from qlora_lab.train.packed_rows import packing_fault
from qlora_lab.train.rounding import tolerance
from qlora_lab.train.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Batch = dict[str, torch.Tensor]
LEFT_OUT = 0.5  # share of examples: if more are too long, the rest no longer represents the user's data
TIGHT = 0.75  # share of the free memory: a step of SmolLM2 on 2,040 tokens peaked at 1.27 times what it keeps
HALF_SCALE = 1024  # factor on a float16 loss: gradients below 6e-8 would vanish; the trainer finds its own factor
BLANK = 0.01  # of the median distance: an embedding closer to zero, or to the mean of all, was never trained

# names of the checks, as a report prints them
END = "end token in labels"
LEARNED = "learned tokens"
LENGTH = "examples left out"
NEW = "new tokens"
ASKED = "turns and fields"
TEXTS = "texts under the template"
FINITE = "finite values"
LIVE = "adapters learn"
CHECKPOINTED = f"{LIVE} with gradient checkpointing"
ACCUMULATION = "gradient accumulation"
SHARE = "trained share"
MEMORY = "memory"
POSITIONS = "row lengths"
PACKED = "packed rows"
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
    """The result of one check. threads: addresses of the user reports that led to it."""

    name: str
    status: Status
    message: str
    threads: tuple[str, ...]


# -------------------------------------------------------------------------------------------------------------- tokens


def end_tokens(encoded: list[Encoded], tokenizer: "Tokenizer") -> Finding:
    """Check that every example of a batch teaches the token that ends an answer, even if it is also the pad token."""
    end = end_token_id(tokenizer)  # id of <|im_end|>, </s> or the like
    pad = pad_token_id(tokenizer)  # None where the tokenizer has none
    batch = collate(encoded, 0 if pad is None else pad)
    text = tokenizer.decode([end])
    total = f"of {len(encoded)} examples"
    lengths = torch.tensor([len(e.input_ids) for e in encoded], dtype=torch.int64)  # (examples,)
    masked = batch["attention_mask"].sum(1) != lengths
    if masked.any():  # a mask made from ids also hides the end token where it serves as padding
        message = f"padding is masked by its id, and with it real tokens in {masked.sum()} {total}"
        return _finding(END, "problem", message)
    lacking = (~(batch["labels"] == end).any(1)).nonzero().flatten().tolist()  # padding is not a label: it cannot help
    if lacking:
        begins = tokenizer.decode(encoded[lacking[0]].input_ids[:16])
        what = f"{text} is not among the labels in {len(lacking)} {total}; the first begins {begins!r}"
        return _finding(END, "problem", f"{what}. A model that never learns it never stops")
    same = "; it is also the pad token, and padding is masked by position" if end == pad else ""
    return _finding(END, "ok", f"{text} in {len(encoded)} {total}{same}")


def learned_tokens(encoded: list[Encoded]) -> Finding:
    """Count the tokens that are learned, and check that no prompt is among them."""
    answer_tokens = sum(e.answer_tokens for e in encoded)
    tokens = sum(len(e.input_ids) for e in encoded)
    silent = sum(e.answer_tokens == 0 for e in encoded)
    whole = sum(e.answer_tokens >= len(e.input_ids) - 1 for e in encoded)  # the first token is never predicted
    moved = sum(any(x not in (y, IGNORED) for x, y in zip(e.labels, e.input_ids, strict=True)) for e in encoded)
    if moved:
        message = f"{moved} of {len(encoded)} examples have labels that are not their tokens: label each token with"
        return _finding(LEARNED, "problem", f"{message} its own id, because models shift the labels by one")
    if silent:
        message = f"{silent} of {len(encoded)} examples have no label: there is nothing to learn"
        return _finding(LEARNED, "problem", message)
    if whole:
        return _finding(LEARNED, "warning", f"{whole} of {len(encoded)} examples teach their prompt too: mask it")
    share = answer_tokens / tokens
    return _finding(LEARNED, "ok", f"{answer_tokens:,} of {tokens:,}, {share:.0%}; the others are prompts, and masked")


def left_out(counts: EncodeReport, max_length: int) -> Finding:
    """Count the examples that are left out because they are longer than `max_length`."""
    seen = counts.kept + counts.too_long
    message = f"{counts.too_long} of {seen} have more than {max_length} tokens, the longest {counts.longest}"
    if counts.too_long > LEFT_OUT * seen:
        return _finding(LENGTH, "warning", f"{message}: most of the data is never seen, so allow longer ones")
    return _finding(LENGTH, "ok", message)


def new_tokens(model: nn.Module, tokenizer: "Tokenizer", encoded: list[Encoded]) -> Finding:
    """Check that every token has an embedding that was trained.

    New rows drawn at random, rather than set to zero or to the mean, cannot be told from trained ones.
    """
    weight = model.get_input_embeddings().weight  # (rows, hidden)
    used = sorted(used_tokens(encoded))  # ids
    if fault := unknown_token(model, tokenizer, used):
        return _finding(NEW, "problem", fault)
    if fault := unknown_token(model, tokenizer, range(len(tokenizer))):  # a token that no example uses, yet
        return _finding(NEW, "warning", fault)
    blank = [] if weight.requires_grad else [used[i] for i in _blank(weight.detach(), used)]
    if blank:
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(blank[:3])))
        message = (
            f"{len(blank)} of {len(used)} tokens in use, {names}, have an embedding that was never trained, and it is "
            "frozen: use a template of trained tokens, or train the embedding"
        )
        return _finding(NEW, "warning", message)
    return _finding(NEW, "ok", f"none: all {len(used):,} in use have a trained row among {len(weight):,}")


def row_lengths(model: nn.Module, encoded: list[Encoded]) -> Finding:
    """Check that the model has a position for each token of the longest example."""
    longest = max(len(example.input_ids) for example in encoded)
    limit = position_limit(model)  # None: positions are computed, not looked up
    if fault := too_long(model, longest):
        status, reason = fault
        return _finding(POSITIONS, status, f"an example has {longest} tokens, but {reason}: set a lower max_length")
    made_for = "any length" if limit is None else f"{limit}"
    return _finding(POSITIONS, "ok", f"at most {longest} tokens; the model was made for {made_for}")


def _blank(weight: torch.Tensor, used: list[int]) -> list[int]:
    """Return positions in `used` of rows that are zero or the mean of all: libraries start new rows so."""
    rows = weight[used].float()  # (used, hidden)
    size = rows.norm(dim=1)  # (used,)
    distance = (rows - weight.mean(0, dtype=torch.float32)).norm(dim=1)  # (used,), from the mean
    blank = (size < BLANK * size.median()) | (distance < BLANK * distance.median())
    return blank.nonzero().flatten().tolist()


# --------------------------------------------------------------------------------------------------------------- steps


def finite_values(model: nn.Module, batch: Batch) -> Finding:
    """Check that every parameter, activation and gradient of a step is finite."""
    with mode(model, training=True):  # dropout and checkpointing as in a step
        nonfinite = first_nonfinite(model, batch)
    if nonfinite:
        return _finding(FINITE, "problem", str(nonfinite))
    return _finding(FINITE, "ok", "parameters, activations and gradients of a step")


def live_adapters(model: nn.Module, batch: Batch, name: str = LIVE) -> Finding:
    """Check that one step of AdamW moves every adapter and nothing that is frozen."""
    frozen = _checksums(model)  # name -> sum of bytes
    with _borrowed(model, training=True) as trained:
        before = {path: _copies(adapter) for path, adapter in adapters(model).items()}
        _accumulate(model, [batch])
        if trained:
            torch.optim.AdamW(trained, lr=Settings.lr).step()
        # one tensor is enough: lora_A has no gradient while lora_B is zero
        dead = [path for path, adapter in adapters(model).items() if _same(_copies(adapter), before[path])]
    changed = [key for key, value in _checksums(model).items() if frozen[key] != value]
    if changed:
        return _finding(name, "problem", f"a step changed {_some(changed)} of the base, which is frozen")
    if dead:
        message = f"{len(dead)} of {len(before)} do not move in a step, their gradient is missing or 0: {_some(dead)}"
        return _finding(name, "problem", message)
    return _finding(name, "ok", f"one step moves all {len(before)}, and none of {len(frozen)} tensors of the base")


def live_checkpointed(model: nn.Module, batch: Batch) -> Finding:
    """Check the same with gradient checkpointing, which a prefix does without."""
    if not _can_checkpoint(model):
        return _finding(CHECKPOINTED, "ok", "leave it off: a prefix needs the keys and values that it drops")
    with checkpointing(model):
        return live_adapters(model, batch, CHECKPOINTED)


def _can_checkpoint(model: nn.Module) -> bool:
    return method_of(model) != "prefix"


def _copies(adapter: Adapter) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in adapter.learned().values()]


def _same(tensors: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


def accumulation(
    model: nn.Module,
    examples: list[Encoded],
    pad_id: int,
    accumulate: Callable[[nn.Module, list[Batch]], None] | None = None,
) -> Finding:
    """Check that a whole batch and one example after another give the same gradients.

    accumulate: a loop of your own that sums the gradients of batches in `.grad`; None for this library's.
    They may differ by rounding only: see `tolerance`, of which float32 gets four times as much.
    """
    if len(examples) < 2:
        return _finding(ACCUMULATION, "warning", "not checked: one example is too few for a comparison")
    runs = []
    for parts in ([examples], [[example] for example in examples]):
        with _borrowed(model, training=False) as trained:  # without dropout, which would draw differently
            (accumulate or _accumulate)(model, [collate(part, pad_id) for part in parts])
            gradients = [p.grad.flatten().double() for p in trained if p.grad is not None]
            runs.append(torch.cat(gradients or [torch.zeros(1, dtype=torch.float64)]))  # (trained elements,)
    once, added = runs  # (trained elements,) each
    if not once.any():  # else the difference would be 0 / 0
        return _finding(ACCUMULATION, "problem", "there is no gradient at all")
    difference = ((once - added).norm() / once.norm()).item()  # relative
    allowed = tolerance(model, sum(len(example.input_ids) for example in examples))
    if getattr(model, "dtype", torch.float32) == torch.float32:
        # It is a root mean square, and a query's gradients are sums that cancel. In 16 bits a wrong average would be
        # too near for that.
        allowed *= 4
    message = f"{len(examples)} at once and {len(examples)} times 1 differ by {difference:.1e} of the gradient"
    if difference <= allowed:
        return _finding(ACCUMULATION, "ok", f"{message}; rounding explains up to {allowed:.1e}")
    advice = "divide by the answer tokens of the whole batch, once"
    return _finding(ACCUMULATION, "problem", f"{message}; rounding explains only {allowed:.1e}: {advice}")


def packed_rows(model: nn.Module, examples: list[Encoded], asked: bool) -> Finding:
    """Check that examples in one row stay apart in this model; a problem only if the run packs (`asked`)."""
    fault = packing_fault(model, examples[0], examples[-1])
    if fault is None:
        return _finding(PACKED, "ok", "examples in one row stay apart: packing may be used")
    return _finding(PACKED, "problem" if asked else "ok", f"leave packing off: {fault}")


def _accumulate(model: nn.Module, batches: list[Batch]) -> None:
    """Sum gradients as a step of the trainer does; in float16 on a scaled loss, or small gradients would vanish."""
    tokens = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
    factor = HALF_SCALE if getattr(model, "dtype", None) == torch.float16 else 1  # a power of two: exact to undo
    accumulate(model, batches, max(tokens, 1), lambda loss: loss * factor)
    for p in model.parameters():
        if p.grad is not None:
            p.grad /= factor


@contextmanager
def _borrowed(model: nn.Module, training: bool) -> Iterator[list[nn.Parameter]]:
    """Lend the parameters that train, as copies without gradients: a step on them leaves no trace."""
    kept = [(p, p.data, p.grad) for p in model.parameters()]
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        with mode(model, training=training), own_draws(model), torch.enable_grad():
            for p, _, _ in kept:
                p.grad = None
            for p in trained:  # adapters only, so the copies are small
                p.data = p.data.clone()
            yield trained
    finally:
        for p, data, grad in kept:
            p.data, p.grad = data, grad  # also after an error


def _checksums(model: nn.Module) -> dict[str, int]:
    """Sum the bytes of every frozen tensor, by name: a copy of a large model would not fit beside it."""
    tensors = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    for path, module in model.named_modules():
        if isinstance(module, PackedModule):
            tensors |= {f"{path}.weight.packed": module.weight.packed, f"{path}.weight.absmax": module.weight.absmax}
    return {name: int(t.reshape(-1).view(torch.uint8).sum()) for name, t in tensors.items()}


# ------------------------------------------------------------------------------------------------------------- weights


def trained_share(policy: DtypePolicy) -> Finding:
    """Report how much of the model trains, and warn if anything but adapters does."""
    message = f"{policy.trained:,} of {policy.weights:,} weights, {policy.share:.2%}"
    if policy.stored != policy.weights:
        message += f" (counting packed bytes as weights would say {policy.trained / policy.stored:.2%})"
    others = sum(row.elements for row in policy.rows if row.what == OTHER_TRAINED)
    if others:
        message += f"; {others:,} of them are outside the adapters, and are not saved with them"
        return _finding(SHARE, "warning", message)
    return _finding(SHARE, "ok", message)


def memory(policy: DtypePolicy, full: int, checkpointed: int, free: int | None, tokens: int) -> Finding:
    """Check that gradients, moments and activations fit beside the weights, which are loaded already.

    full, checkpointed: bytes of activations for `tokens` tokens at once, without and with gradient checkpointing.
    """
    first = (GRADIENTS, COPIES, MOMENTS)  # made by the first step
    extra = sum(row.nbytes for row in policy.rows if row.what in first)  # bytes
    message = (
        f"{_mib(extra)} of gradients and moments, {_mib(full)} of activations for {tokens:,} tokens at once "
        f"({_mib(checkpointed)} with gradient checkpointing; measured on short examples and scaled)"
    )
    if free is None:
        return _finding(MEMORY, "ok", f"{message}; this system does not say how much is free")
    message += f"; {_mib(free)} are free"
    if extra + checkpointed > free:
        return _finding(MEMORY, "problem", f"{message}: use fewer or shorter examples at once, or 8-bit moments")
    if extra + full > free:
        advice = "switch gradient checkpointing on, or use fewer examples at once"
        return _finding(MEMORY, "problem", f"{message}: {advice}")
    status = "warning" if extra + full > TIGHT * free else "ok"
    return _finding(MEMORY, status, f"{message}{', which is tight' if status == 'warning' else ''}")


def activations(model: nn.Module, batch: Batch, tokens: int) -> tuple[int, int]:
    """Return the bytes kept for the backward pass of `tokens` tokens, without and with gradient checkpointing."""
    full = _kept(model, batch)  # bytes
    measured = batch["input_ids"].numel()  # tokens of the batch, padding included
    if not _can_checkpoint(model):
        return full * tokens // measured, full * tokens // measured
    with checkpointing(model):
        # plus one layer at a time, recomputed in the backward pass
        less = _kept(model, batch) + full // max(1, getattr(model.config, "num_hidden_layers", 1))
    return full * tokens // measured, min(full, less) * tokens // measured


def _kept(model: nn.Module, batch: Batch) -> int:
    """Count the bytes that a forward pass keeps for its backward pass: each storage once, and no weights."""
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()  # a view shares its storage: counted once
        return tensor

    with (
        _borrowed(model, training=True),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        loss = answer_loss(model, batch)[0]  # keeps its graph alive, so that no address is used twice
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
