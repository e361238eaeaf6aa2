"""Check what a model can read: tokens with a row in its embedding, and rows no longer than its positions.

A row beyond `max_position_embeddings` is a warning if the model computes positions (rotary, ALiBi), because it was
trained on shorter rows. It is an error if each position has a stored row. Rows of two and of three tokens show which: a
table whose highest look-up rises by one with one token more is a table of positions. A list of names or module types
would not know the next family, nor GPT-J, whose table is a buffer. Only without such a table is the long row itself
tried, because on a GPU a look-up beyond a table's end kills the process.
"""

import warnings
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_lab.adapters.virtual_tokens import virtual_tokens
from qlora_lab.data.dataset import IGNORED, Encoded, collate
from qlora_lab.model.modes import measuring
from qlora_lab.model.out_of_memory import is_out_of_memory
from qlora_lab.train.loss import answer_loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def fill_id(model: nn.Module, tokenizer: "Tokenizer") -> int:
    """An id to pad rows with: the pad token, else the end token, else 0.

    Padding is neither learned nor attended to, so any id with a row in the embedding will do.
    """
    ids = tokenizer.pad_token_id, tokenizer.eos_token_id  # either may be None, or beyond the embedding
    return next((number for number in ids if number is not None and 0 <= number < embedding_rows(model)), 0)


def embedding_rows(model: nn.Module) -> int:
    """How many token ids, from 0, the model has an embedding for."""
    return model.get_input_embeddings().weight.shape[0]


def unknown_token(model: nn.Module, tokenizer: "Tokenizer", ids: Collection[int]) -> str | None:
    """What is wrong with a token of `ids` that has no embedding; None if all have one."""
    rows = embedding_rows(model)
    lowest = min(ids, default=0)
    highest = max(ids, default=0)
    if lowest < 0:
        return f"a token has id {lowest}, but ids are whole numbers from 0 to {rows - 1:,}: encode the text again"
    if highest < rows:
        return None
    return (
        f"{tokenizer.convert_ids_to_tokens(highest)!r} has id {highest}, but the embedding has {rows:,} rows: call "
        "model.resize_token_embeddings(len(tokenizer)) and train the embedding, or use other tokens"
    )


def check_tokens(model: nn.Module, tokenizer: "Tokenizer", ids: Collection[int]) -> None:
    """Raise ValueError if the model has no embedding for a token of `ids`."""
    if fault := unknown_token(model, tokenizer, ids):
        raise ValueError(fault)


def used_tokens(encoded: Iterable[Encoded]) -> set[int]:
    """All ids that a step reads or learns."""
    return {token for example in encoded for token in (*example.input_ids, *example.labels)} - {IGNORED}


def check_pictures(model: nn.Module, encoded: Iterable[Encoded]) -> None:
    """Raise ValueError if the model cannot read a picture, by trying one of each shape: its tower decides.

    Most processors give all pictures one shape, so that is one forward pass.
    """
    tried = set()
    for example in encoded:
        new = [picture for picture in example.pictures if picture.shapes not in tried]
        if not new:
            continue
        tried.update(picture.shapes for picture in new)
        try:
            with measuring(model):
                answer_loss(model, collate([example], 0))
        except (ValueError, TypeError, RuntimeError) as error:  # TypeError: a model of texts takes no pixel_values
            if is_out_of_memory(error):  # which says nothing about the picture
                raise
            reason = " ".join(str(error).split())
            fix = "use the processor of this model, which resizes pictures to what its tower takes"
            raise ValueError(f"{type(model).__name__} cannot read {new[0].path} ({reason:.120}): {fix}") from None


def check_length(model: nn.Module, length: int, row: str, advice: str) -> None:
    """Warn if a row of `length` tokens is longer than the model was made for; raise ValueError if it cannot be read.

    row: what has that length, in words; advice: how to get a shorter one.
    """
    if fault := too_long(model, length):
        status, reason = fault
        message = f"{row} has {length} tokens, but {reason}: {advice}"
        if status == "problem":
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)


def too_long(model: nn.Module, length: int) -> tuple[Literal["warning", "problem"], str] | None:
    """Why a row of `length` tokens is too long for the model; None if it is not."""
    limit = position_limit(model)
    name = type(model).__name__
    virtual = virtual_tokens(model)
    if limit is None or length + virtual <= limit:
        return None
    before = f", and {virtual} virtual tokens come first" if virtual else ""
    stored = stored_positions(model, limit)
    if stored is not None and length > stored:  # found by reading, so behind the virtual tokens
        return "problem", f"{name} stores {stored} positions{before}"
    if stored is None and not _reads(model, length):
        return "problem", f"{name} cannot read more than {limit}{before}"
    return "warning", f"{name} was made for {limit} positions and gets worse beyond them{before}"


def position_limit(model: nn.Module) -> int | None:
    """The longest row that the configuration says the model was made for, rotary scaling included; None if unsaid."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))  # MPT has the latter
    if not isinstance(limit, int) or limit < 1:
        return None
    rotary = getattr(config, "rope_parameters", None) or {}  # scaling, such as YaRN's, extends the limit
    # Some models have one for each kind of layer.
    scalings = [rotary, *(part for part in rotary.values() if isinstance(part, dict))]
    return max(limit, *(_scaled(limit, scaling) for scaling in scalings))


def _scaled(limit: int, scaling: dict) -> int:
    return int((scaling.get("original_max_position_embeddings") or limit) * (scaling.get("factor") or 1))


def stored_positions(model: nn.Module, limit: int) -> int | None:
    """How many positions the model stores, in a table of at least `limit` rows; None if it computes them."""
    two = _looked_up(model, 2)
    three = _looked_up(model, 3)
    tables = [rows for rows in two.keys() & three.keys() if rows >= limit and three[rows] == two[rows] + 1]
    # The third token's position is 2; a table that looks it up further down, as OPT's does, stores fewer positions.
    return min((rows - (three[rows] - 2) for rows in tables), default=None)


def _reads(model: nn.Module, length: int) -> bool:
    """Whether a row of `length` tokens goes through the model; its last token alone goes through the head."""
    ids = torch.zeros(1, length, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    labels[0, -1] = 0  # any token: the loss itself is thrown away
    try:
        with measuring(model):
            answer_loss(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    except torch.OutOfMemoryError:
        return True  # running out of memory says nothing about positions
    except RuntimeError:  # such as MPT's, whose bias for positions is too small
        return False
    return True


def _looked_up(model: nn.Module, tokens: int) -> dict[int, int]:
    """Rows of a table -> the highest index into it, for each table that a row of `tokens` zeros looks up."""
    device = next(model.parameters()).device
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    with measuring(model), _LookUps() as look_ups:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return look_ups.highest


class _LookUps(TorchDispatchMode):
    """Watch torch's look-ups by integer. highest: rows of a table -> the highest index into any table of that size.

    torch documents this base class, but has no public name for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.highest: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for rows, index in _look_ups(function, args):
            if index.numel() and not index.is_floating_point() and index.dtype != torch.bool:
                self.highest[rows] = max(self.highest.get(rows, 0), int(index.max()))
        return function(*args, **(kwargs or {}))


def _look_ups(function, args) -> list[tuple[int, torch.Tensor]]:
    """(rows of the table, index) of a call of torch's that looks rows up."""
    aten = torch.ops.aten  # F.embedding, index_select, gather and t[ids] all end here
    if function is aten.embedding.default:
        return [(args[0].shape[0], args[1])]
    if function in (aten.index_select.default, aten.gather.default):
        return [(args[0].shape[args[1]], args[2])]
    if function is aten.index.Tensor:
        return [(args[0].shape[i], index) for i, index in enumerate(args[1]) if index is not None]
    return []
