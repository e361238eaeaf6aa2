"""The training doctor: looks for what goes wrong silently, before a run of hours.

In: a model with adapters, its tokenizer, and data. Out: a Report of Findings, with the threads of users who met it.
On a sample of the data: the tokens of 32 examples, and steps with 8 short ones of them.

Not here: the checks (checks.py, data_checks.py), printing (cli.py), tokens in colour (LabelView takes
Report.labels).
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from qlora_lab.adapters.lora import adapters
from qlora_lab.data.dataset import Encoded, EncodeReport, collate, encode_all, load_data, show_labels
from qlora_lab.data.examples import Example
from qlora_lab.data.labels import Notes
from qlora_lab.doctor.checks import (
    ACCUMULATION,
    CHECKPOINTED,
    FINITE,
    LIVE,
    MEMORY,
    PACKED,
    POSITIONS,
    Finding,
    accumulation,
    activations,
    end_tokens,
    finite_values,
    learned_tokens,
    left_out,
    live_adapters,
    memory,
    new_tokens,
    packed_rows,
    row_lengths,
    trained_share,
)
from qlora_lab.doctor.data_checks import asked_for, texts
from qlora_lab.doctor.dtype_policy import DtypePolicy, dtype_policy
from qlora_lab.doctor.free_memory import free_memory
from qlora_lab.model.modes import checkpointing
from qlora_lab.train.limits import fill_id
from qlora_lab.train.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

SAMPLED = 32  # examples whose tokens are looked at
STEPPED = 8  # of them, those that steps are made of
WIDTH, INDENT = 120, 9  # of a printed report: columns, and those of a status


@dataclass(frozen=True)
class Report:
    """All findings; a line each, with the threads under those that are not "ok".

    skipped: checks that could not run because of a problem before them. labels: (text, learned) for each token of one
    example, for LabelView. dtypes: which bytes have which dtype.
    """

    findings: tuple[Finding, ...]
    skipped: tuple[str, ...]
    labels: list[tuple[str, bool]] = field(repr=False)
    dtypes: DtypePolicy = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether there is no problem; there may be warnings."""
        return all(finding.status != "problem" for finding in self.findings)

    def to_dict(self) -> dict:
        """Everything but the labels, as plain values for JSON."""
        findings = [asdict(finding) for finding in self.findings]
        return {"ok": self.ok, "findings": findings, "skipped": self.skipped, "dtypes": self.dtypes.to_dict()}

    def __str__(self) -> str:
        lines = []
        for one in self.findings:
            lines += _lines(one.status, f"{one.name}: {one.message}")
            lines += [line for thread in one.threads if one.status != "ok" for line in _lines("", thread)]
        lines += _lines("skipped", ", ".join(self.skipped))
        return "\n".join(lines)


def diagnose(
    model: "PreTrainedModel",
    tokenizer: "Tokenizer",
    data: str | Path | Sequence[Example] | Sequence[Encoded] = "docstrings",
    *,
    max_length: int = Settings.max_length,
    batch_size: int = Settings.batch_size,
    optimizer_bits: int = Settings.optimizer_bits,
    packing: bool = Settings.packing,
    seed: int = Settings.seed,
    progress: bool = True,
) -> Report:
    """Examine a run before it starts: as long as about six of its steps on short examples.

    data: as finetune takes it, or examples that you encoded yourself. max_length, batch_size (rows at once),
    optimizer_bits and packing: of the planned run. seed: of the sample.
    Raises ValueError for a model without adapters, data without a short enough example, or a setting out of range.
    """
    options = {"max_length": max_length, "batch_size": batch_size, "optimizer_bits": optimizer_bits}
    Settings(**options, packing=packing, seed=seed)  # raises
    adapters(model)  # raises if there is none
    policy = dtype_policy(model, optimizer_bits)
    examples = load_data(data, progress=progress) if isinstance(data, (str, Path)) else list(data)
    encoded, counts = _sample(examples, tokenizer, max_length, seed, progress)
    findings = [end_tokens(encoded, tokenizer), learned_tokens(encoded), left_out(counts, max_length)]
    records = [example for example in examples if isinstance(example, Example)]
    findings += [asked_for(records), texts(counts.notes, len(encoded), as_tokens=not records)]
    findings += [trained_share(policy), new_tokens(model, tokenizer, encoded)]
    unseen = [POSITIONS]
    if readable := findings[-1].status != "problem":  # else no step can be made
        findings.append(row_lengths(model, encoded))
        readable, unseen = findings[-1].status != "problem", []
    few, pad_id = _few(encoded), fill_id(model, tokenizer)
    batch, tokens = collate(few, pad_id), batch_size * max_length
    free = free_memory(next(model.parameters()).device)  # before the steps below take some

    def live_checkpointed() -> Finding:
        with checkpointing(model):
            return live_adapters(model, batch, CHECKPOINTED)

    steps = {
        FINITE: lambda: finite_values(model, batch),
        LIVE: lambda: live_adapters(model, batch),
        CHECKPOINTED: live_checkpointed,
        ACCUMULATION: lambda: accumulation(model, few, pad_id),
        PACKED: lambda: packed_rows(model, few, packing),
        MEMORY: lambda: memory(policy, *activations(model, batch, tokens), free, tokens),
    }
    if readable:
        bar = tqdm(list(steps), "doctor", unit="check", leave=False, disable=not progress)
        for name in bar:
            bar.set_postfix_str(name)
            findings.append(steps.pop(name)())
            if name == FINITE and findings[-1].status == "problem":
                break
    return Report(tuple(findings), (*unseen, *steps), show_labels(encoded[0], tokenizer), policy)


def _sample(
    examples: list, tokenizer, max_length: int, seed: int, progress: bool
) -> tuple[list[Encoded], EncodeReport]:
    """Up to SAMPLED short enough examples, drawn as the trainer draws them, and what was passed over."""
    order = np.random.default_rng(seed).permutation(len(examples))
    shuffled = [examples[i] for i in order]
    if not examples or isinstance(examples[0], Example):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the findings say the same
            return encode_all(shuffled, tokenizer, max_length, SAMPLED, progress)
    lengths = [len(one.input_ids) for one in shuffled]
    kept = [one for one in shuffled if len(one.input_ids) <= max_length]
    if not kept:
        shortest = min(lengths)
        raise ValueError(
            f"no example has at most {max_length} tokens: allow at least {shortest}, the length of the shortest"
        )
    counts = sum(len(one.input_ids) for one in kept), sum(one.answer_tokens for one in kept)
    notes = sum((one.notes for one in kept[:SAMPLED]), Notes())
    return kept[:SAMPLED], EncodeReport(len(kept), len(shuffled) - len(kept), max(lengths), *counts, notes)


def _few(encoded: list[Encoded]) -> list[Encoded]:
    """Short examples, which are cheap, with answers of unlike lengths, where wrong averages show."""
    short = sorted(encoded, key=lambda one: len(one.input_ids))[: 2 * STEPPED]
    if len(short) <= STEPPED:
        return short
    short.sort(key=lambda one: one.answer_tokens)
    return short[: STEPPED // 2] + short[-STEPPED // 2 :]


def _lines(status: str, text: str) -> list[str]:
    """The text beside its status, wrapped; addresses stay whole."""
    parts = wrap(text, WIDTH - INDENT, break_long_words=False, break_on_hyphens=False)
    return [f"{status if i == 0 else '':<{INDENT}}{part}" for i, part in enumerate(parts)]
