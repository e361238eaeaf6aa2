"""Ask one model the same questions, quantised one way after another, and keep every log-likelihood on disk.

In: a model, Variants (in_place.py) and Questions. Out: a row for each variant in a JSONL file (results_file.py), with
the log-likelihoods of each question's answers, so that choice_summary.py can pair any two rows of the same questions.
A variant that has a row with the same model, adapter, prompts, versions and quantiser is not run again, so the same
call continues a stopped one.

Each model is loaded anew, as its users load it: weights stay packed, and an adapter sees the base that it runs on. On a
CPU it computes in float32. In bf16 a log-likelihood of -20 has steps of 0.125, and answers would tie.
Not here: the log-likelihoods (multiple_choice.py), accuracies and intervals (choice_summary.py).
"""

import hashlib
import json
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import torch
from tqdm.auto import tqdm

from qlora_lab.adapters.peft_format import load_adapter
from qlora_lab.adapters.saving import adapter_checksum
from qlora_lab.data.choice_files import LETTERS, group_by_subject
from qlora_lab.data.choice_prompts import Task
from qlora_lab.files.out_path import out_path
from qlora_lab.files.results_file import Kind, append_result, identity, open_results, read_results, with_checksum
from qlora_lab.files.strict_json import LIST, OBJECT, SWITCH, TEXT, or_null, whole
from qlora_lab.measure.in_place import Variant, checked, original
from qlora_lab.measure.multiple_choice import Encoded, choice_scores, encode
from qlora_lab.measure.sweep import model_record, run_record, variant_record
from qlora_lab.model.empty_model import tokenizer_of
from qlora_lab.model.load import fast_dtype, load

RULES = dict.fromkeys(("model", "data", "config", "versions", "subjects"), OBJECT) | {"log_likelihoods": LIST}
RULES |= {"codebook": or_null(TEXT), "block_size": or_null(whole(1)), "double_quant": or_null(SWITCH), "right": TEXT}
RULES |= {"adapter": or_null(TEXT), "quantiser": or_null(TEXT), "lengths": or_null(OBJECT)}
DECISIVE = ("model", "adapter", "data", "config", "codebook", "block_size", "double_quant", "quantiser", "versions")
CHOICES = Kind("multiple-choice", "a multiple-choice run", RULES, DECISIVE)


def choice_rows(
    name_or_path: str | Path,
    settings: Iterable[Variant | tuple],
    task: Task,
    results: str | Path,
    *,
    adapter: str | Path | None = None,
    progress: bool = True,
) -> list[dict]:
    """Return a row for each of `settings`, in their order; measure and append those that the file `results` lacks.

    settings: Variants with a codebook that ql.load knows. adapter: a folder in PEFT's format, put on every variant.
    A row has model, data (name, questions, tokens_sha256), config (answers, shots, dtype, device), codebook,
    block_size, double_quant, quantiser, adapter (a checksum, or null), adapter_name; subjects (name -> number of
    questions, in their order), right (a letter a question), log_likelihoods (four numbers a question, in nats), lengths
    (of the answers, by the metric that divides by them; null for letters); versions, commit, machine, seconds,
    processor_seconds (of all threads), date, sha256.
    Raises whatever load, load_adapter, encode, check_fits and open_results raise, and ValueError for fitted levels.
    """
    results = out_path(results)  # before anything is loaded
    settings = [_loadable(checked(setting)) for setting in settings]
    task = task.checked()
    folder = original(name_or_path, "variants are made", progress)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else fast_dtype(device)
    with open_results(results, CHOICES) as (rows, file):
        done = {identity(row, CHOICES): row for row in rows}  # by earlier calls
        # Tokens do not depend on the weights, so they are made once, before any model is loaded.
        encoded = encode(tokenizer_of(folder), task)
        shared = {"model": model_record(name_or_path, folder), "data": _data_record(task, encoded)}
        shared |= run_record({"answers": task.way, "shots": task.shots}, dtype, device) | _adapter_record(adapter)
        measured = []
        bar = tqdm(settings, "multiple choice", unit="model", disable=not progress)
        try:
            for variant in bar:
                bar.set_postfix_str(str(variant))
                row = shared | variant_record(variant, device) | _answer_key(task)
                if (same := identity(row, CHOICES)) not in done:
                    row = with_checksum(row | _measured(name_or_path, variant, task, encoded, adapter, progress))
                    append_result(file, row)  # on the disk before the next model
                    done[same] = row
                measured.append(done[same])
        except KeyboardInterrupt:
            said = f"{len(measured)} of {len(settings)} models are in {results}; the same call goes on from there"
            raise KeyboardInterrupt(said) from None
    return measured


def read_choices(path: str | Path) -> list[dict]:
    """Read the rows of a file that choice_rows wrote. Raises what read_results raises."""
    return read_results(path, CHOICES)


def _loadable(variant: Variant) -> Variant:
    if variant.levels is not None or (variant.codebook or "").startswith("lloyd-max"):
        raise ValueError(f"codebook {variant.codebook!r} is fitted or made by hand: take a named one, such as nf4")
    return variant


def _measured(
    name_or_path: str | Path,
    variant: Variant,
    task: Task,
    encoded: list[Encoded],
    adapter: str | Path | None,
    progress: bool,
) -> dict:
    start, processor = time.perf_counter(), time.process_time()
    how = (variant.codebook, variant.block_size, bool(variant.double_quant))
    dtype = torch.float32 if not torch.cuda.is_available() else None
    # Without its own bar: a load takes seconds, and the bar of models is there.
    model, tokenizer = load(name_or_path, *how, dtype=dtype, progress=False)
    if adapter is not None:
        load_adapter(model, adapter)
    scores = choice_scores(model, tokenizer, task, encoded=encoded, progress=progress)
    _check_finite(scores, variant)
    return {
        # 7 digits, as float32 has: 0.6 MB for each model on MMLU's 14,042 questions, and lengths besides
        "log_likelihoods": [[float(f"{value:.7g}") for value in values] for values in scores],
        "lengths": _lengths(task),
        "seconds": float(f"{time.perf_counter() - start:.3g}"),
        "processor_seconds": float(f"{time.process_time() - processor:.3g}"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _check_finite(scores: list[tuple[float, ...]], variant: Variant) -> None:
    for number, values in enumerate(scores, 1):
        if not all(abs(value) < float("inf") for value in values):  # true for NaN, too
            raise FloatingPointError(f"{variant}: the log-likelihoods of question {number} are {values}")


def _lengths(task: Task) -> dict[str, list[list[int]]] | None:
    """Return how long the answers are, by the metric that divides by it; None for letters, which are equally long."""
    if task.way == "letters":
        return None
    # Kept in the row, so that its reader needs no questions.
    texts = [question.options for question in task.questions.test]
    return {
        "acc_norm": [[len(text) for text in options] for options in texts],  # characters
        "acc_bytes": [[len(text.encode()) for text in options] for options in texts],
    }


def _answer_key(task: Task) -> dict:
    groups = group_by_subject(task.questions.test)
    right = "".join(LETTERS[question.answer] for group in groups.values() for question in group)
    return {"subjects": {subject: len(group) for subject, group in groups.items()}, "right": right}


def _data_record(task: Task, encoded: list[Encoded]) -> dict:
    """Record the questions. Their checksum covers prompts, answers and which one is right."""
    # Tokens, not texts: two tokenizers read one text in different pieces.
    content = [[one.context, one.answers, q.answer] for one, q in zip(encoded, task.questions.test, strict=True)]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return {"name": task.questions.name, "questions": len(encoded), "tokens_sha256": digest}


def _adapter_record(adapter: str | Path | None) -> dict:
    """Record an adapter's name and the checksum of its files, which identifies it."""
    if adapter is None:
        return {"adapter": None, "adapter_name": None}
    return {"adapter": adapter_checksum(adapter), "adapter_name": Path(adapter).name}
