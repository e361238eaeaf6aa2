"""~ is the home folder in every path that a user hands over. Two lists name them, and a search finds what they lack."""

import ast
import re
import shutil
from functools import cached_property
from importlib import import_module
from pathlib import Path

import pytest

import qlora_lab as ql
from qlora_lab.files.home import expanded

ROOT = Path(ql.__file__).parent
T = "~/taken"  # a folder that nothing below can read or write over, because of the file in it:
OWN = "log.jsonl"  # a run's name, but no run wrote it; no adapter has it, no model needs it, and it holds no record


class World:
    """Small things to call functions with; what takes long is made once."""

    def __init__(self, home: Path):
        self.home = home
        self.out = home / "new"

    def load(self, codebook="nf4"):
        return ql.load(self.home / "model", codebook, progress=False)

    @cached_property
    def loaded(self):
        model, tokenizer = self.load()
        return ql.add_lora(model, r=2), tokenizer

    @property
    def model(self):
        return self.loaded[0]

    @cached_property
    def packed(self):
        return self.load()[0]

    @cached_property
    def bank(self):
        bank = ql.AdapterBank(self.load()[0])
        bank.add("a", self.adapter)
        return bank

    @cached_property
    def adapter(self):
        return ql.save_adapter(self.model, self.home / "adapter")

    @cached_property
    def seeing(self):
        """A tokenizer that says it reads pictures: files come before it is asked."""
        tokenizer = self.load()[1]
        tokenizer.processor = object()
        return tokenizer

    @cached_property
    def plan(self):
        from qlora_lab.quant.plan import Plan

        return Plan("a model", {}, 0.0, 0.0, {})

    @cached_property
    def systems(self):
        from qlora_lab.measure.answers import System

        return [System("a", "nf4"), System("b", "fp4")]

    @cached_property
    def task(self):
        from qlora_lab.data.choice_files import ChoiceQuestion, Questions
        from qlora_lab.data.choice_prompts import Task

        return Task(Questions("one", (ChoiceQuestion("sums", "2 + 2?", ("1", "2", "3", "4"), 3),), {}), 0)

    def plain(self):
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM.from_pretrained(self.home / "model")

    def folders(self, **named):
        from qlora_lab.export.merge_folders import Folders, merge_folders

        folders = {"model": self.home / "model", "adapter": self.adapter}
        return merge_folders(Folders(**folders | named), self.out, "original", progress=False)


ASKED = "<image>\nWhat?"
RECORDS = [{"prompt": "a", "completion": "b"}]
quiet = {"progress": False}
# module.function(parameter) -> how it is called with T. Each must fail, and name T's true place.
CALLS = {
    "adapters.loftq.loftq(source)": lambda w, m: m.loftq(w.packed, r=2, source=T, **quiet),
    "adapters.many.AdapterBank.add(folder)": lambda w, m: w.bank.add("b", T),
    "adapters.many.AdapterBank.save(folder)": lambda w, m: w.bank.save("a", T),
    "adapters.peft_format.save_adapter(folder)": lambda w, m: m.save_adapter(w.model, T),
    "adapters.peft_format.read_adapter(folder)": lambda w, m: m.read_adapter(w.packed, T),
    "adapters.peft_format.load_adapter(folder)": lambda w, m: m.load_adapter(w.packed, T),
    "adapters.peft_format.method_in(folder)": lambda w, m: m.method_in(T),
    "adapters.saving.adapter_checksum(folder)": lambda w, m: m.adapter_checksum(T),
    "data.choice_files.read_questions(path)": lambda w, m: m.read_questions(T),
    "data.dataset.load_data(source)": lambda w, m: m.load_data(T),
    "data.examples.read_examples(source)": lambda w, m: m.read_examples(T),
    "data.records.records(source)": lambda w, m: list(m.records(T)),
    "doctor.diagnose.diagnose(data)": lambda w, m: m.diagnose(*w.loaded, T, **quiet),
    "doctor.machine.check_report_path(path)": lambda w, m: m.check_report_path(T),
    "doctor.machine.save_report(path)": lambda w, m: m.save_report(T, None),
    "show.playable.check_page_path(path)": lambda w, m: m.check_page_path(T),
    "show.playable.save_text(path)": lambda w, m: m.save_text(T, ""),
    "show.playable.save_page(path)": lambda w, m: m.save_page(None, T, False),
    "export.conformance.conformance(folder)": lambda w, m: m.conformance("reference", T, progress=False),
    "export.gguf_out.to_gguf(name_or_path)": lambda w, m: m.to_gguf(T, w.out, **quiet),
    "export.gguf_out.to_gguf(out)": lambda w, m: m.to_gguf(w.home / "model", T, **quiet),
    "export.merge.check_new(out)": lambda w, m: m.check_new(T),
    "export.merge.merge(out)": lambda w, m: m.merge(w.model, T, **quiet),
    "export.merge.merge(source)": lambda w, m: m.merge(w.model, w.out, source=T, **quiet),
    "export.merge_folders.Folders(model)": lambda w, m: w.folders(model=T),
    "export.merge_folders.Folders(adapter)": lambda w, m: w.folders(adapter=T),
    "export.merge_folders.Folders(original)": lambda w, m: w.folders(original=T),
    "export.merge_folders.merge_folders(out)": lambda w, m: m.merge_folders(
        m.Folders(w.home / "model", w.adapter), T, **quiet
    ),
    "export.xray.Checkpoint(path)": lambda w, m: m.Checkpoint(T),
    "exercises.grade.find_notebooks(paths)": lambda w, m: m.find_notebooks([T]),
    "exercises.grade.check_scores_path(path)": lambda w, m: m.check_scores_path(T),
    "exercises.grade.save_scores(path)": lambda w, m: m.save_scores(T, [], ""),
    "exercises.submission.read_submission(path)": lambda w, m: m.read_submission(T),
    "files.results_file.read_results(path)": lambda w, m: m.read_results(T),
    "files.results_file.verify_rows(path)": lambda w, m: m.verify_rows(T),
    "measure.ablations.read_ablations(path)": lambda w, m: m.read_ablations(T),
    "measure.answers.System(adapter)": lambda w, m: m.check_systems([*w.systems, m.System("c", "nf4", adapter=T)]),
    "measure.answers.systems(adapters)": lambda w, m: m.check_systems(m.systems(["nf4"], [T])),
    "measure.answers.answer_all(name_or_path)": lambda w, m: m.answer_all(T, w.systems, [], w.out, **quiet),
    "measure.answers.answer_all(out)": lambda w, m: m.answer_all(w.home / "model", w.systems, [], T, **quiet),
    "measure.answers.check_unchanged(name_or_path)": lambda w, m: m.check_unchanged(T, w.systems, w.out, 1, False),
    "measure.answers.check_unchanged(out)": lambda w, m: m.check_unchanged(w.home / "model", w.systems, T, 1, False),
    "measure.choice_rows.choice_rows(name_or_path)": lambda w, m: m.choice_rows(T, [(None,)], w.task, w.out, **quiet),
    "measure.choice_rows.choice_rows(results)": lambda w, m: m.choice_rows(
        w.home / "model", [(None,)], w.task, T, **quiet
    ),
    "measure.choice_rows.choice_rows(adapter)": lambda w, m: m.choice_rows(
        w.home / "model", [(None,)], w.task, w.out, adapter=T, **quiet
    ),
    "measure.choice_rows.read_choices(path)": lambda w, m: m.read_choices(T),
    "measure.held_out.generate(pictures)": lambda w, m: m.generate(w.model, w.seeing, ASKED, pictures=T, **quiet),
    "measure.in_place.original(name_or_path)": lambda w, m: m.original(T, "a sweep starts", False),
    "measure.judgments.read_games(path)": lambda w, m: m.read_games(T, **quiet),
    "measure.play.play(out)": lambda w, m: m.play(
        [m.Question("1", "a", "b")],
        {"a": {"1": "x"}, "b": {"1": "y"}},
        lambda *_: "A",
        T,
        **quiet,
    ),
    "measure.play.check_tournament(out)": lambda w, m: m.check_tournament(T, None, ["a", "b"], []),
    "measure.sensitivity.choices_of(model)": lambda w, m: m.choices_of(T, [("nf4", 64, True)], {}, **quiet),
    "measure.sweep.sweep(name_or_path)": lambda w, m: m.sweep(T, [(None,)], w.out, **quiet),
    "measure.sweep.sweep(results)": lambda w, m: m.sweep(w.home / "model", [(None,)], T, **quiet),
    "memory.weights.predicted_weights(name_or_path)": lambda w, m: m.predicted_weights(T),
    "model.fetch.resolve(name_or_path)": lambda w, m: m.resolve(T),
    "model.linear4bit.quantize_linears(plan)": lambda w, m: m.quantize_linears(w.plain(), plan=T),
    "model.load.load(name_or_path)": lambda w, m: m.load(T, **quiet),
    "model.load.load(plan)": lambda w, m: m.load(w.home / "model", plan=T, **quiet),
    "model.quantized_folder.quantize_folder(name_or_path)": lambda w, m: m.quantize_folder(T, w.out, **quiet),
    "model.quantized_folder.quantize_folder(out)": lambda w, m: m.quantize_folder(w.home / "model", T, **quiet),
    "model.quantized_folder.quantize_folder(plan)": lambda w, m: m.quantize_folder(
        w.home / "model", w.out, plan=T, **quiet
    ),
    "quant.plan.as_plan(plan)": lambda w, m: m.as_plan(T),
    "quant.plan.check_plan_path(path)": lambda w, m: m.check_plan_path(T),
    "quant.plan.load_plan(path)": lambda w, m: m.load_plan(T),
    "quant.plan.Plan.save(path)": lambda w, m: w.plan.save(T),
    "train.run_folder.check_free(out)": lambda w, m: m.check_free(T),
    "train.run_folder.reserved_run(out)": lambda w, m: m.reserved_run(T, False, False).__enter__(),
    "train.toy_llava.toy_llava(out)": lambda w, m: m.toy_llava(T, None, [], **quiet),
    "train.toy_llava.toy_llava(language)": lambda w, m: m.toy_llava(w.out, None, [None], language=T, **quiet),
    "train.trainer.finetune(data)": lambda w, m: m.finetune(*w.loaded, T, out=w.out, **quiet),
    "train.trainer.finetune(out)": lambda w, m: m.finetune(*w.loaded, RECORDS, out=T, **quiet),
    "train.trainer.Training(data)": lambda w, m: m.Training(*w.loaded, T, w.out, **quiet),
    "train.trainer.Training(out)": lambda w, m: m.Training(*w.loaded, RECORDS, T, **quiet),
    "train.verify.verify(folder)": lambda w, m: m.verify(T, **quiet),
}


def _made_in(folder, module):
    """Make a run that makes nothing: whether its row lies in this folder of the home folder."""

    def run(folder, *_):
        folder.mkdir()
        return {"right": {}}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_in_process", run)
        module.seeing_rows(f"~/{folder.name}", seeds=1, runs=module.RUNS[:1], **quiet)
    return (folder / module.FILE).is_file()


# These write beside the file, or hold one without a name there. Each returns whether it did that in the home folder.
WRITES = {
    "adapters.saving.AdapterSaver.__call__(save_directory)": lambda w, m: (
        m.AdapterSaver(w.model)("~/beside") or (w.home / "beside" / "adapter_config.json").is_file()
    ),
    "data.choice_files.write_questions(folder)": lambda w, m: (
        m.write_questions(w.task.questions, "~/beside") or (w.home / "beside" / "test" / "sums_test.csv").is_file()
    ),
    "data.shapes.write_shapes(folder)": lambda w, m: (
        m.write_shapes("~/shapes", []) == next((w.home / "shapes").glob("*.jsonl"))
    ),
    "measure.seeing_rows.seeing_rows(work)": lambda w, m: _made_in(w.home / "beside", m),
    "measure.lm_eval.harness_tasks(folder)": lambda w, m: (
        str(w.home / "beside") in str(m.harness_tasks(w.task, "~/beside"))
    ),
    "model.load.public_name(name_or_path)": lambda w, m: m.public_name("~/model") == str(w.home / "model"),
    "optim.paged_adamw.PagedAdamW(folder)": lambda w, m: m.PagedAdamW(
        [w.parameter], page_size=4096, budget=4096, folder=T
    ),
    "optim.paging.Pages(folder)": lambda w, m: m.Pages(2 * 4096, 4096, 4096, T),
    "optim.stores.FileStore(folder)": lambda w, m: m.FileStore(2, 4096, 1, T),
}
LABELS = {  # a name for a record or a message; who opens it has expanded it
    "measure.sweep.model_record(name_or_path)",
    "model.fetch.known_name(name)",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, saved_llama):
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(saved_llama, home / "model")
    return World(home)


@pytest.fixture
def home(world, monkeypatch, tmp_path):
    """The home folder, with T in it as it was at first. The current folder is another, and must stay empty."""
    monkeypatch.setenv("HOME", str(world.home))
    monkeypatch.setenv("USERPROFILE", str(world.home))  # what Windows reads
    monkeypatch.chdir(tmp_path)
    (world.home / "taken").mkdir(exist_ok=True)
    (world.home / "taken" / OWN).write_text("mine")
    yield world.home
    assert list(tmp_path.iterdir()) == [] and (world.home / "taken" / OWN).read_text() == "mine"


def user_paths() -> set[str]:
    """module.function(parameter) for each parameter, or field of a class, that is annotated as a str or a Path."""
    found = set()
    for path in ROOT.rglob("*.py"):
        room = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        # what writes for others, but for the one file of it that users read with; and who expands every word
        if room == "files.results_file" or room.partition(".")[0] not in ("files", "cli"):
            _collect(ast.parse(path.read_text("utf-8")), room, found)
    return found


def _collect(node: ast.AST, place: str, found: set[str]) -> None:
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.AnnAssign) and isinstance(node, ast.ClassDef):
            _add(inner.annotation, place, ast.unparse(inner.target), found)
        if not isinstance(inner, (ast.FunctionDef, ast.ClassDef)):
            continue
        if inner.name.startswith("_") and inner.name not in ("__init__", "__call__"):  # its callers have expanded it
            continue
        own = place if inner.name == "__init__" else f"{place}.{inner.name}"
        if isinstance(inner, ast.ClassDef):
            _collect(inner, own, found)
        else:
            for argument in [*inner.args.posonlyargs, *inner.args.args, *inner.args.kwonlyargs]:
                _add(argument.annotation, own, argument.arg, found)


def _add(annotation: ast.expr | None, place: str, name: str, found: set[str]) -> None:
    words = set(re.findall(r"\w+", ast.unparse(annotation))) if annotation else set()
    if {"str", "Path"} <= words and "dict" not in words:
        found.add(f"{place}({name})")


def test_each_function_that_takes_a_path_is_called_below():
    assert user_paths() == CALLS.keys() | WRITES.keys() | LABELS
    assert len(CALLS) > 50, "the search finds nothing"


def module_of(place: str):
    """The module whose room and file begin `place`."""
    return import_module(".".join(["qlora_lab", *place.split(".")[:2]]))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("place", CALLS)
def test_an_error_names_the_path_in_the_home_folder(world, home, place):
    with pytest.raises((ValueError, OSError)) as error:
        CALLS[place](world, module_of(place))
    assert str(home / "taken") in str(error.value)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("place", WRITES)
def test_what_is_written_lies_in_the_home_folder(world, home, place):
    import torch

    world.parameter = torch.nn.Parameter(torch.zeros(4096))
    assert WRITES[place](world, module_of(place))


def test_paths_that_are_not_in_a_home_folder_stay(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    same = ["runs/~x", "/a/~", "a~", ".", ""]
    assert [expanded(path) for path in same] == [Path(path) for path in same]
    assert expanded("~/a") == expanded(Path("~/a")) == Path("/home/me/a")
    for odd in ("~nobody-has-this-name/a", "./~"):  # a folder of that name, here
        assert expanded(odd) == expanded(expanded(odd)) == tmp_path / Path(odd)
