"""The training doctor: checks, before a run of hours, for failures that raise no error.

It examines a sample of the data: the tokens of 32 examples, and steps on 8 short ones of them.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from qlora_lab.adapters.adapter import adapters
from qlora_lab.data.dataset import Encoded, EncodeReport, collate, encode_all, load_data, show_labels
from qlora_lab.data.examples import Example, Examples, last_answer_only
from qlora_lab.data.labels import Notes
from qlora_lab.doctor import checks
from qlora_lab.doctor.checks import Finding
from qlora_lab.doctor.data_checks import asked_for, texts
from qlora_lab.doctor.dtype_policy import DtypePolicy, dtype_policy
from qlora_lab.doctor.free_memory import free_memory
from qlora_lab.model.loaded import check_pair
from qlora_lab.train.limits import fill_id
from qlora_lab.train.loop import shuffled
from qlora_lab.train.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

SAMPLED = 32  # examples whose tokens are examined
STEPPED = 8  # of them, those that make up the steps
WIDTH = 120  # columns of a printed report
INDENT = 9  # columns of a status


@dataclass(frozen=True)
class Report:
    """All findings, one a line, with the threads below each that is not "ok".

    skipped: checks that an earlier problem prevented. labels: (text, learned) for each token of one
    example, for LabelView. dtypes: which bytes have which dtype.
    """

    findings: tuple[Finding, ...]
    skipped: tuple[str, ...]
    labels: list[tuple[str, bool]] = field(repr=False)
    dtypes: DtypePolicy = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether there is no problem. There may be warnings."""
        return all(finding.status != "problem" for finding in self.findings)

    def to_dict(self) -> dict:
        """Everything but the labels, as plain values for JSON."""
        findings = [asdict(finding) for finding in self.findings]
        return {"ok": self.ok, "findings": findings, "skipped": self.skipped, "dtypes": self.dtypes.to_dict()}

    def __str__(self) -> str:
        lines = []
        for finding in self.findings:
            lines += _lines(finding.status, f"{finding.name}: {finding.message}")
            lines += [line for thread in finding.threads if finding.status != "ok" for line in _lines("", thread)]
        lines += _lines("skipped", ", ".join(self.skipped))
        return "\n".join(lines)


USUAL = Settings()  # a run with the defaults


def diagnose(
    model: "PreTrainedModel",
    tokenizer: "Tokenizer",
    data: str | Path | Iterable = "docstrings",
    settings: Settings = USUAL,
    *,
    skip_bad: bool = False,
    progress: bool = True,
) -> Report:
    """Examine a run before it starts; this takes about as long as six of its steps on short examples.

    data: as for finetune, or examples that you encoded yourself. settings: of the planned run; max_length, batch_size
    (rows at once), optimizer_bits, last_answer_only, packing and seed count here. skip_bad: as for finetune.
    Raises ValueError for a model without adapters, data without a short enough example, or a setting out of range.
    """
    check_pair(model, tokenizer)
    adapters(model)  # raises if there is none
    policy = dtype_policy(model, settings.optimizer_bits)  # before steps create gradients
    as_tokens = isinstance(data, Sequence) and data and isinstance(data[0], Encoded)
    examples = list(data) if as_tokens else load_data(data, skip_bad=skip_bad, progress=progress)
    if settings.last_answer_only and not as_tokens:
        examples = last_answer_only(examples)
    encoded, counts = _sample(examples, tokenizer, settings, skip_bad, progress)
    findings = [checks.end_tokens(encoded, tokenizer), checks.learned_tokens(encoded)]
    findings.append(checks.left_out(counts, settings.max_length))
    records = [example for example in examples if isinstance(example, Example)]  # none if the data came as tokens
    skipped = [*getattr(examples, "skipped", ()), *counts.skipped]
    findings += [asked_for(records, skipped), texts(counts.notes, len(encoded), as_tokens=not records)]
    findings += [checks.trained_share(policy), checks.new_tokens(model, tokenizer, encoded)]
    unseen = [checks.POSITIONS]
    if readable := findings[-1].status != "problem":  # otherwise no step can be made
        findings.append(checks.row_lengths(model, encoded))
        readable = findings[-1].status != "problem"
        unseen = []
    few = _few(encoded)
    pad_id = fill_id(model, tokenizer)
    batch = collate(few, pad_id)
    tokens = settings.batch_size * settings.max_length  # at once, in the planned run
    free = free_memory(next(model.parameters()).device)  # before the steps below take some

    steps = {
        checks.FINITE: lambda: checks.finite_values(model, batch),
        checks.LIVE: lambda: checks.live_adapters(model, batch),
        checks.CHECKPOINTED: lambda: checks.live_checkpointed(model, batch),
        checks.ACCUMULATION: lambda: checks.accumulation(model, few, pad_id),
        checks.PACKED: lambda: checks.packed_rows(model, few, settings.packing),
        checks.MEMORY: lambda: checks.memory(policy, *checks.activations(model, batch, tokens), free, tokens),
    }
    if readable:
        bar = tqdm(list(steps), "doctor", unit="check", leave=False, disable=not progress)
        for name in bar:
            bar.set_postfix_str(name)
            findings.append(steps.pop(name)())  # what is left was skipped
            if name == checks.FINITE and findings[-1].status == "problem":  # every later check would repeat it
                break
    return Report(tuple(findings), (*unseen, *steps), show_labels(encoded[0], tokenizer), policy)


def _sample(
    examples: list, tokenizer, settings: Settings, skip_bad: bool, progress: bool
) -> tuple[list[Encoded], EncodeReport]:
    """Return up to SAMPLED examples that are short enough, drawn as the trainer does, and counts of the others."""
    max_length = settings.max_length
    examples = shuffled(examples, settings.seed)  # as the trainer draws its sample
    if not examples or isinstance(examples[0], Example):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the findings repeat them
            drawn = Examples(examples, skip_bad=skip_bad)
            return encode_all(drawn, tokenizer, max_length, SAMPLED, progress)
    lengths = [len(example.input_ids) for example in examples]
    kept = [example for example in examples if len(example.input_ids) <= max_length]
    if not kept:
        advice = f"set max_length={min(lengths)} or more, the length of the shortest"
        raise ValueError(f"no example has at most {max_length} tokens: {advice}")
    counts = sum(len(example.input_ids) for example in kept), sum(example.answer_tokens for example in kept)
    notes = sum((example.notes for example in kept[:SAMPLED]), Notes())
    return kept[:SAMPLED], EncodeReport(len(kept), len(examples) - len(kept), max(lengths), *counts, notes)


def _few(encoded: list[Encoded]) -> list[Encoded]:
    """Choose short examples, which are cheap, whose answers differ in length, so that wrong averages show."""
    short = sorted(encoded, key=lambda example: len(example.input_ids))[: 2 * STEPPED]
    if len(short) <= STEPPED:
        return short
    short.sort(key=lambda example: example.answer_tokens)
    return short[: STEPPED // 2] + short[-STEPPED // 2 :]  # the shortest and the longest answers


def _lines(status: str, text: str) -> list[str]:
    """Wrap the text beside its status; addresses stay whole."""
    parts = wrap(text, WIDTH - INDENT, break_long_words=False, break_on_hyphens=False)
    return [f"{status if i == 0 else '':<{INDENT}}{part}" for i, part in enumerate(parts)]
