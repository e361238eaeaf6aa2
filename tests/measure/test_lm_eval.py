"""lm-evaluation-harness, which builds prompts and reads models on its own, finds the same numbers.

It has an environment of its own (Makefile), so the comparisons are a process there.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import qlora_lab as ql
from qlora_lab.adapters.lora import adapters
from qlora_lab.data.choice_files import ChoiceQuestion, Questions, read_questions, write_questions
from qlora_lab.data.choice_prompts import Task
from qlora_lab.data.docstring_choice import LIBRARIES, docstring_choice
from qlora_lab.measure.lm_eval import harness_model, harness_tasks
from tests.data.test_choice_files import small_questions

ROOT = Path(__file__).parents[2]
THERE = Path(sys.prefix, "eval", "bin", "python")
HARNESS = sys.executable if find_spec("lm_eval") else str(THERE)
installed = pytest.mark.skipif(
    not (find_spec("lm_eval") or THERE.exists()), reason="lm-evaluation-harness is not there: make .venv/eval/.ready"
)

# [model, adapter or "", folder of questions, shots, folder for the harness' files], ... as JSON -> a line of JSON for
# each: way -> findings. One process for all: to import the harness and to load a model costs more than a few questions.
COMPARE = """
import json, sys
import torch
from lm_eval import simple_evaluate
import qlora_lab as ql
from qlora_lab.data.choice_files import read_questions
from qlora_lab.measure.choice_rows import _lengths
from qlora_lab.measure.lm_eval import harness_model, harness_tasks
from qlora_lab.data.choice_prompts import Task
from qlora_lab.measure.multiple_choice import choice_scores
torch.set_num_threads(1)
for name, adapter, folder, shots, files in json.loads(sys.argv[1]):
    model, tokenizer = ql.load(name, "nf4", dtype=torch.float32, progress=False)
    if adapter:
        ql.load_adapter(model, adapter)
    lines = {}
    for way in ("letters", "texts"):
        task = Task(read_questions(folder), shots, way)
        tasks = harness_tasks(task, f"{files}/{way}")
        found = simple_evaluate(harness_model(model, tokenizer), tasks=tasks, bootstrap_iters=0)
        theirs = [[value for value, _ in s["filtered_resps"]] for part in found["samples"].values() for s in part]
        accuracies = {name: {metric: values.get(f"{metric},none") for metric in ("acc", "acc_norm", "acc_bytes")}
                      for name, values in found["results"].items()}
        lines[way] = {"ours": choice_scores(model, tokenizer, task, progress=False), "theirs": theirs,
                      "accuracies": accuracies, "lengths": _lengths(task)}
    print(json.dumps(lines))
"""


class Job(NamedTuple):
    """What both are asked: a model, the folder of an adapter or "", and questions with so many shots."""

    model: str
    adapter: str
    questions: Questions
    shots: int


def small_model(folder: Path, home: Path) -> Job:
    model, _ = ql.load(folder, progress=False)
    ql.add_lora(model, r=2)
    generator = torch.Generator().manual_seed(0)
    for layer in adapters(model).values():
        layer.lora_B.data.normal_(generator=generator)
    adapter = ql.save_adapter(model, home / "adapter")
    questions = read_questions(small_questions(home / "mmlu"))
    awkward = ChoiceQuestion("anatomy", "  Où?\n\n ", ("é", " the two", "the  sum\n", "the sum of the two numbers"), 1)
    questions = Questions("any", (*questions.test, awkward), questions.dev)  # bytes and characters differ
    return Job(str(folder), str(adapter), questions, 2)


def default_model() -> Job:
    # One question each from two of the four libraries: the small model above reads the awkward ones in a second.
    generated = docstring_choice(2, libraries=LIBRARIES[:2], progress=False)
    return Job("smollm2-135m", "", Questions("any", generated.test, generated.dev), 1)


@pytest.fixture(scope="module")
def compared(tmp_path_factory, saved_llama) -> dict[str, tuple[Questions, dict]]:
    """Which model -> its questions, and what both found by letters and by texts."""
    home = tmp_path_factory.mktemp("harness")
    jobs = {"small": small_model(saved_llama, home), "default": default_model()}
    words = []
    for name, job in jobs.items():
        write_questions(job.questions, home / name / "any")
        words.append([job.model, job.adapter, str(home / name / "any"), job.shots, str(home / name / "tasks")])
    # No network: the harness looks for data and metrics on the hub first.
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(home / "home")}
    environment = os.environ | offline | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    command = [HARNESS, "-c", COMPARE, json.dumps(words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"letters"')]
    return {name: (job.questions, lines) for (name, job), lines in zip(jobs.items(), found, strict=True)}


@installed
@pytest.mark.slow
@pytest.mark.parametrize("which", ["small", "default"])
def test_the_harness_agrees_on_a_small_model_with_an_adapter_and_on_the_default_one_in_nf4(compared, which):
    """On every log-likelihood and every accuracy, by letters and by texts."""
    questions, lines = compared[which]
    assert list(lines) == ["letters", "texts"]
    for way, found in lines.items():
        assert len(found["ours"]) == len(found["theirs"]) == len(questions.test)
        for ours, theirs in zip(found["ours"], found["theirs"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)  # float32 sums of another order
        check_accuracies(found, questions, way)


def check_accuracies(found: dict, questions: Questions, way: str) -> None:
    from qlora_lab.measure.choice_rows import _answer_key
    from qlora_lab.measure.choice_summary import accuracies

    row = {"log_likelihoods": found["ours"], "lengths": found["lengths"], **_answer_key(Task(questions))}
    for metric in ("acc",) if way == "letters" else ("acc", "acc_norm", "acc_bytes"):
        shares = accuracies(row, metric).subjects
        theirs = [values[metric] for values in found["accuracies"].values()]
        assert [share.mean for share in shares.values()] == pytest.approx(theirs, abs=1e-12)


def test_a_task_has_the_harness_fields_and_its_data(tmp_path):
    questions = read_questions(small_questions(tmp_path / "mmlu"))
    first, second = harness_tasks(Task(questions, 1, "texts"), tmp_path / "tasks")
    assert first["task"] == "mmlu_abstract_algebra_texts" and second["num_fewshot"] == 1
    lines = Path(first["dataset_kwargs"]["data_files"]["test"]).read_text("utf-8").splitlines()
    assert json.loads(lines[0]) == {
        "question": "three\nlines, here",
        "choices": ["1", "2", "None", "04"],
        "answer": 2,
    }


def test_whole_prompts_are_no_task(tmp_path):
    questions = Questions("prompts", (ChoiceQuestion("x", "", (), 0, "Which?\nAnswer:"),), {})
    with pytest.raises(ValueError, match="prompts holds whole prompts: give questions in MMLU's form"):
        harness_tasks(Task(questions), tmp_path)


def test_a_subject_writes_no_file_elsewhere(tmp_path):
    questions = Questions("any", (ChoiceQuestion("../x", "?", tuple("abcd"), 0),), {})
    with pytest.raises(ValueError, match=r"any: the subject '../x' is not allowed: it names a file"):
        harness_tasks(Task(questions, 0), tmp_path / "tasks")
    assert list(tmp_path.iterdir()) == []


def test_without_the_harness_the_error_says_what_to_install(monkeypatch, tiny_llama, tokenizer):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"lm-evaluation-harness is needed .*: pip install 'qlora-lab\[eval\]'"):
        harness_model(tiny_llama, tokenizer)
