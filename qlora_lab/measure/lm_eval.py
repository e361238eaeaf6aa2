"""The bridge to lm-evaluation-harness (extra `eval`): our models in its hands, and our questions as its tasks.

    from lm_eval import simple_evaluate
    model, tokenizer = ql.load("smollm2-135m")            # in 4 bits; ql.load_adapter(model, folder) may follow
    results = simple_evaluate(harness_model(model, tokenizer), tasks=harness_tasks(Task(questions), "tasks"))

In: a model of ql.load, or Questions. Out: an LM of the harness; tasks as dicts, their data as JSON lines in a folder.
The harness builds the prompts, reads the model and counts on its own, so it is a witness of multiple_choice.py: the
same accuracies, and log-likelihoods to 1e-4. It reads every prompt whole, and again for each answer of several tokens.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_lab.data.choice_files import ChoiceQuestion, check_file_names, group_by_subject
from qlora_lab.data.choice_prompts import Task, header
from qlora_lab.files import disk
from qlora_lab.files.out_path import out_path
from qlora_lab.files.replace import replace_text

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerBase as Tokenizer

# As in the harness' own MMLU, but for white space around a question, which MMLU's evaluation keeps.
TEXT = {"letters": "{{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"}
TEXT["texts"] = "Question: {{question.strip()}}\nAnswer:"
CHOICES = {"letters": ["A", "B", "C", "D"], "texts": "{{choices}}"}
METRICS = {"letters": ("acc",), "texts": ("acc", "acc_norm", "acc_bytes")}


def harness_model(model: torch.nn.Module, tokenizer: "Tokenizer", batch_size: int = 8) -> "HFLM":
    """Return the model as an LM of the harness, with its adapter if it has one. Nothing is copied.

    A tokenizer without a pad token gets one from the harness. Raises ValueError if the harness is not installed.
    """
    try:
        from lm_eval.models.huggingface import HFLM  # seconds, and not everybody has it
    except ImportError as error:
        raise ValueError(f"lm-evaluation-harness is needed ({error}): pip install 'qlora-lab[eval]'") from error
    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


def harness_tasks(task: Task, folder: str | Path) -> list[dict[str, Any]]:
    """Write the data of one task for each subject into `folder`, and return them as dicts for simple_evaluate.

    Raises ValueError as Task.checked does, for a subject that cannot be part of a file's name, and for a file of whole
    prompts, which leaves nothing to build.
    """
    task = task.checked()
    questions = task.questions
    if questions.test[0].prompt is not None:
        raise ValueError(f"{questions.name} holds whole prompts: give questions in MMLU's form")
    groups = group_by_subject(questions.test)
    check_file_names(groups, questions.name)
    folder = out_path(folder).resolve()  # the harness reads later, perhaps from elsewhere
    tasks = []
    for subject, group in groups.items():
        files = {}
        for split, part in {"test": group, "dev": questions.dev.get(subject, ())}.items():
            if part:  # a split without examples is no file
                path = folder / f"{subject}_{split}.jsonl"
                disk.make_folder(path.parent)
                replace_text(path, "".join(f"{json.dumps(_record(question))}\n" for question in part))
                files[split] = str(path)
        tasks.append(_harness_task(task, subject, files, folder))
    return tasks


def _record(question: ChoiceQuestion) -> dict[str, Any]:
    return {"question": question.text, "choices": list(question.options), "answer": question.answer}


def _harness_task(task: Task, subject: str, files: dict[str, str], folder: Path) -> dict[str, Any]:
    way = task.way
    examples = {"fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}} if "dev" in files else {}
    return {
        "task": f"{task.questions.name}_{subject}_{way}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},  # not in the user's home
        "test_split": "test",
        **examples,
        "num_fewshot": task.shots,
        "description": header(subject, way),
        "output_type": "multiple_choice",
        "doc_to_text": TEXT[way],
        "doc_to_choice": CHOICES[way],
        "doc_to_target": "answer",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS[way]],
        "metadata": {"version": 1.0},
    }
