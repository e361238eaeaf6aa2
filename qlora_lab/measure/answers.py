"""Let systems answer the questions of a tournament, one model in memory at a time, and keep every answer.

A system is a model with one data type, and an adapter or none. An answer is a row of a file as soon as its batch is
done, so no model is asked twice, and none is loaded whose answers are all there.
Answers are greedy, in batches as held_out takes them. How rows are padded can move a logit in its last bits, so an
answer may depend on the other questions of its batch where two tokens are all but equally likely.
Not here: the games (play.py).
"""

import gc
import hashlib
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import torch
from tqdm.auto import tqdm

from qlora_lab.adapters.peft_format import load_adapter, method_in
from qlora_lab.adapters.saving import adapter_checksum
from qlora_lab.files.out_path import out_path, resolved
from qlora_lab.files.results_file import Kind, append_result, identity, open_results, read_results, with_checksum
from qlora_lab.files.strict_json import OBJECT, TEXT
from qlora_lab.measure.held_out import ANSWER_TOKENS, ANSWERS_AT_ONCE, generate_answers
from qlora_lab.measure.in_place import Variant, original
from qlora_lab.measure.judges import Question, check_name
from qlora_lab.measure.sweep import model_record, run_record, variant_record
from qlora_lab.model.load import fast_dtype, load
from qlora_lab.quant.blocks import check_block_size
from qlora_lab.quant.codebook import codebook as named_codebook
from qlora_lab.quant.numbers import check_whole

RULES = {"system": OBJECT, "question": TEXT, "prompt_sha256": TEXT, "answer": TEXT}
# The whole record of a system decides an answer, so an adapter that was trained anew in its folder answers anew.
ANSWERS = Kind("tournament", "a system's answers", RULES, ("system", "question", "prompt_sha256"), "system")
# Fields of a system's record that its user chooses, in words. The others, such as versions, change answers rarely.
CHOSEN = {"weights_sha256": "the model", "config_sha256": "the model's config.json", "adapter": "the adapter"}
CHOSEN |= {name: name for name in ("codebook", "block_size", "double_quant", "max_new_tokens")}


@dataclass(frozen=True)
class System:
    """One data type of a model, and an adapter's folder or None. The defaults are those of `load`."""

    name: str
    codebook: str | None = "nf4"  # None: not quantised
    block_size: int = 64
    double_quant: bool = True
    adapter: str | Path | None = None


def systems(
    codebooks: Iterable[str | None],
    adapters: Iterable[str | Path] = (),
    block_size: int = 64,
    double_quant: bool = True,
) -> list[System]:
    """List each data type, without an adapter and with each of `adapters`.

    >>> [system.name for system in systems([None, "nf4"], ["runs/first/adapter"])]
    ['none', 'none + runs/first/adapter', 'nf4', 'nf4 + runs/first/adapter']
    """
    adapters = [None, *adapters]  # read once for each data type
    return [
        System(
            (codebook or "none") + ("" if adapter is None else f" + {adapter}"),
            codebook,
            block_size,
            double_quant,
            adapter,
        )
        for codebook in codebooks
        for adapter in adapters
    ]


def check_systems(contestants: Sequence[System]) -> None:
    """Check everything that can be checked without a model.

    Raises ValueError for a data type or block size that is not allowed, for a name that is empty or there twice, for an
    adapter that is there in two spellings, and for fewer than two systems; FileNotFoundError for a folder without one.
    """
    spellings: dict[tuple, str] = {}
    for system in contestants:
        check_name("a system's name", system.name)
        if system.adapter is not None:
            # "ad" and "./ad" are one adapter: each game between them would be a tie that says nothing.
            folder = resolved(system.adapter)
            same = str(system.codebook), system.block_size, system.double_quant, folder
            if (other := spellings.setdefault(same, str(system.adapter))) != str(system.adapter):
                raise ValueError(f"adapters {other!r} and {str(system.adapter)!r} are one, {folder}: name it once")
        if system.codebook is not None:
            named_codebook(system.codebook)
            check_block_size(system.block_size)
    repeated = [name for name, count in Counter(system.name for system in contestants).items() if count > 1]
    if repeated:
        raise ValueError(f"system {repeated[0]!r} is there twice: name each data type and each adapter once")
    if len(contestants) < 2:
        # a data type alone is called 'none' if nothing is quantised, so names are quoted
        words = f"only one system: {contestants[0].name!r}" if contestants else "no system"
        raise ValueError(f"{words}; a tournament needs two or more, so add a data type or an adapter")
    for adapter in {system.adapter for system in contestants if system.adapter is not None}:
        method_in(adapter)


def answer_all(
    name_or_path: str | Path,
    contestants: Iterable[System],
    questions: Sequence[Question],
    out: str | Path,
    *,
    max_new_tokens: int = ANSWER_TOKENS,
    progress: bool = True,
) -> dict[str, dict[str, str]]:
    """Return system -> question's id -> answer; ask for those that the file `out` lacks, and append them.

    Models compute in float32 on the CPU, as in a sweep, and otherwise in load's choice for the GPU.
    A row has system (name, weights_sha256, config_sha256, adapter; codebook, block_size, double_quant, levels and
    quantiser; config and versions, as in a sweep's rows), question, prompt_sha256, model (name, source), commit,
    machine, answer, date and sha256 (of all fields before it). An edited quantiser answers anew.
    An interrupt says how many answers are kept. Raises what check_systems, load, load_adapter and open_results raise,
    and ValueError for a model that is quantised already.
    """
    out = out_path(out)  # before anything is loaded
    contestants = list(contestants)
    check_whole("max_new_tokens", max_new_tokens)
    check_systems(contestants)
    with open_results(out, ANSWERS) as (rows, file):
        done = {identity(row, ANSWERS): row["answer"] for row in rows}
        asked = _Asked(name_or_path, max_new_tokens, progress)
        records = {system.name: asked.record(system) for system in contestants}
        wanted = {name: {q.id: _head(record, q) for q in questions} for name, record in records.items()}
        answers: dict[str, dict[str, str]] = {}
        bar = tqdm(contestants, "systems", unit="system", disable=not progress)
        try:
            for system in bar:
                bar.set_postfix_str(repr(system.name)[1:-1])  # a folder's name may hold control characters
                heads = wanted[system.name]
                missing = [question for question in questions if identity(heads[question.id], ANSWERS) not in done]
                if missing:
                    for same, answer in asked.answer(system, missing, heads, file):
                        done[same] = answer  # one by one, so that an interrupt counts what is on the disk
                    gc.collect()  # a model's modules refer to each other, and the next must not come on top
                answers[system.name] = {id: done[identity(head, ANSWERS)] for id, head in heads.items()}
        except KeyboardInterrupt:
            kept = [identity(head, ANSWERS) in done for heads in wanted.values() for head in heads.values()]
            said = f"{sum(kept)} of {len(kept)} answers are in {out}; the same call goes on from there"
            raise KeyboardInterrupt(said) from None
    return answers


class _Asked:
    """The model that all systems share, on disk; each is loaded for itself."""

    def __init__(self, name_or_path: str | Path, max_new_tokens: int, progress: bool):
        self.name_or_path = name_or_path
        self.max_new_tokens = max_new_tokens
        self.progress = progress
        folder = original(name_or_path, "a tournament starts", progress)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.float32 if self.device.type == "cpu" else fast_dtype(self.device)
        record = model_record(name_or_path, folder)  # reads every weight once: 0.2 s for SmolLM2
        self.sums = {name: record.pop(name) for name in ("weights_sha256", "config_sha256")}
        run = run_record({"max_new_tokens": max_new_tokens}, self.dtype, self.device)
        self.run = {name: run.pop(name) for name in ("config", "versions")}
        # What a row names but is not identified by: a folder may be moved, and most commits change no answer.
        self.about = {"model": record} | run

    def record(self, system: System) -> dict:
        """Record what decides the answers of a system."""
        adapter = None if system.adapter is None else adapter_checksum(system.adapter)
        variant = Variant(system.codebook, system.block_size, system.double_quant)
        return {
            "name": system.name,
            **self.sums,
            "adapter": adapter,
            **variant_record(variant, self.device),  # the quantiser's checksum, since a checkout may be edited
            **self.run,
        }

    def answer(self, system: System, questions: list[Question], heads: dict[str, dict], file: BinaryIO) -> Iterator:
        """Load the system, append its answers batch by batch, and yield each one's identity and text."""
        options = {"dtype": self.dtype, "device": self.device, "progress": self.progress}
        model, tokenizer = load(self.name_or_path, system.codebook, system.block_size, system.double_quant, **options)
        if system.adapter is not None:
            load_adapter(model, system.adapter)
        for start in range(0, len(questions), ANSWERS_AT_ONCE):
            batch = questions[start : start + ANSWERS_AT_ONCE]
            examples = [question.answered(question.reference) for question in batch]  # only the prompt is read
            texts = generate_answers(model, tokenizer, examples, self.max_new_tokens, progress=self.progress)
            for question, text in zip(batch, texts, strict=True):
                row = heads[question.id] | self.about | {"answer": text}
                append_result(file, with_checksum(row | {"date": datetime.now(UTC).isoformat(timespec="seconds")}))
                yield identity(row, ANSWERS), text


def check_unchanged(
    name_or_path: str | Path, contestants: Iterable[System], out: str | Path, max_new_tokens: int, progress: bool = True
) -> None:
    """Raise ValueError if a system's model, adapter or options differ from those of its rows in the file `out`.

    For callers whose answers were judged already. It reads all weights, but loads no model. A name without rows is new.
    """
    asked = _Asked(name_or_path, max_new_tokens, progress)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a torn last line: answer_all says it when it cuts the line off
        rows = read_results(out, ANSWERS)
    changes: dict[str, list[str]] = {}  # what differs -> systems
    for system in contestants:
        record = asked.record(system)
        found = [_changes(row["system"], record) for row in rows if row["system"].get("name") == system.name]
        # Any of them: a file that was copied to judge the answers anew may hold several.
        for change in found[-1] if found and all(found) else ():
            changes.setdefault(change, []).append(system.name)
    if changes:
        said = "; ".join(f"{change} ({', '.join(names)})" for change, names in changes.items())
        raise ValueError(f"{out} holds answers that were judged, and now they may differ: {said}: name another place")


def _changes(before: dict, now: dict) -> list[str]:
    """Say what differs of what a user chooses; checksums are told by what they are of."""
    config = before.get("config")
    theirs = before | (config if isinstance(config, dict) else {})  # a file that was edited may hold anything
    ours = now | now["config"]
    return [
        f"{words} has changed{f' from {theirs.get(field)} to {ours[field]}' if words == field else ''}"
        for field, words in CHOSEN.items()
        if theirs.get(field) != ours[field]
    ]


def _head(record: dict, question: Question) -> dict:
    """Return the fields of a row that decide its answer."""
    prompt = hashlib.sha256(question.prompt.encode()).hexdigest()  # an id may stand for another text tomorrow
    return {"system": record, "question": question.id, "prompt_sha256": prompt}
