"""`qlora-lab multiple-choice`: rows that agree with the library, that resume, and mistakes in one line."""

import json
import re

import pytest
import torch

import qlora_lab as ql
from qlora_lab import cli
from qlora_lab.adapters.lora import adapters
from qlora_lab.data.choice_files import read_questions
from qlora_lab.data.choice_prompts import Task
from qlora_lab.files.checksums import DIFFERS, OK
from qlora_lab.files.results_file import verify_rows
from qlora_lab.measure import choice_rows as module
from qlora_lab.measure.choice_rows import choice_rows, read_choices
from qlora_lab.measure.choice_summary import accuracies, difference
from qlora_lab.measure.multiple_choice import choice_scores
from tests.data.test_choice_files import AUTHORS, small_questions

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(tmp_path):
    return small_questions(tmp_path / "mmlu")


@pytest.fixture
def results(tmp_path):
    return tmp_path / "there" / "rows.jsonl"


@pytest.fixture
def trained(tmp_path, folder):
    """An adapter that changes answers."""
    model, _ = ql.load(folder, progress=False)
    ql.add_lora(model, r=2)
    for layer in adapters(model).values():
        layer.lora_B.data.normal_()
    return ql.save_adapter(model, tmp_path / "adapter")


def quiet(folder, settings, task, results, **options):
    return choice_rows(folder, settings, task, results, progress=False, **options)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:the adapter in .* was trained beside weights in nf4")  # the point of comparing
@pytest.mark.parametrize("way", ["letters", "texts"])
def test_a_row_says_what_load_and_choice_scores_say(folder, data, results, trained, way):
    task = Task(read_questions(data), 1, way)
    rows = quiet(folder, [(None,), ("nf4", 32, True)], task, results, adapter=trained)
    for how, row in zip([(None,), ("nf4", 32, True)], rows, strict=True):
        model, tokenizer = ql.load(folder, *how, dtype=torch.float32, progress=False)
        ql.load_adapter(model, trained)
        want = choice_scores(model, tokenizer, task, progress=False)
        assert row["log_likelihoods"] == [pytest.approx(values, rel=1e-6) for values in want]
    assert rows[0]["right"] == "CDDA" and rows[0]["subjects"] == {"abstract_algebra": 2, "anatomy": 2}
    if way == "texts":
        assert rows[0]["lengths"]["acc_norm"][0] == [1, 1, 4, 2]  # of "1", "2", "None" and "04"
    assert read_choices(results) == rows
    assert [part.state for part in verify_rows(results)] == [OK, OK]


@pytest.mark.long
def test_a_second_call_goes_on(folder, data, results, monkeypatch):
    task = Task(read_questions(data), 1)
    seen = []
    real = module.load
    monkeypatch.setattr(module, "load", lambda name, *how, **options: seen.append(how) or real(name, *how, **options))
    first = quiet(folder, [(None,), ("nf4",)], task, results)
    again = quiet(folder, [("nf4",), ("fp4",), (None, 99)], task, results)
    assert seen == [(None, 64, False), ("nf4", 64, False), ("fp4", 64, False)]
    assert again[0] == first[1] and again[2] == first[0] and read_choices(results) == [*first, again[1]]


@pytest.mark.long
def test_other_questions_prompts_and_adapters_are_measured_again(folder, data, results, trained):
    questions = read_questions(data)
    for task in (Task(questions, 1), Task(questions, 2), Task(questions.sample(3), 1), Task(questions, 1, "texts")):
        quiet(folder, [("nf4",)], task, results)
    quiet(folder, [("nf4",)], Task(questions, 1), results, adapter=trained)
    rows = read_choices(results)
    assert len(rows) == 5
    assert rows[4]["adapter_name"] == "adapter" and len(rows[4]["adapter"]) == 64 and rows[0]["adapter"] is None
    with pytest.raises(ValueError, match="other questions"):
        difference(rows[1], rows[0])


def test_an_interrupt_says_how_far_it_came(folder, data, results, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    quiet(folder, [(None,)], Task(read_questions(data), 1), results)
    monkeypatch.setattr(module, "_measured", stop)
    with pytest.raises(KeyboardInterrupt, match="1 of 2 models are in .*rows.jsonl; the same call goes on from there"):
        quiet(folder, [(None,), ("nf4",)], Task(read_questions(data), 1), results)


def test_a_changed_row_is_found(folder, data, results):
    quiet(folder, [(None,), ("nf4",)], Task(read_questions(data), 1), results)
    whole = results.read_text()
    changed = re.sub(r'("log_likelihoods": \[\[-?\d)', r"\g<1>9", whole, count=1)
    assert changed != whole
    results.write_text(changed)
    assert [part.state for part in verify_rows(results)] == [DIFFERS, OK]


def test_what_is_not_finite_is_no_row(folder, data, results, monkeypatch):
    def broken(*how, **options):
        model, tokenizer = ql.load(*how, **options)
        model.model.norm.weight.data[0] = torch.nan
        return model, tokenizer

    monkeypatch.setattr(module, "load", broken)
    with pytest.raises(FloatingPointError, match="nf4, blocks of 64: the log-likelihoods of question 1 are"):
        quiet(folder, [("nf4",)], Task(read_questions(data), 1), results)
    assert not results.exists()


# --------------------------------------------------------------------------------------------------- the command line


def run(capsys, *argv):
    capsys.readouterr()  # what saving the model said
    code = cli.main(["multiple-choice", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def test_tables_and_json(capsys, folder, data, results):
    options = ["--codebooks", "none", "nf4", "nf4", "--double-quant", "both", "--data", data, "--shots", 1]
    options += ["--answers", "texts", "--out", results, "--quiet"]
    code, out, _ = run(capsys, folder, *options)
    lines = out.splitlines()
    assert code == 0 and lines[0] == "acc: the likeliest answer by sum"
    assert lines[1].split() == ["codebook", "accuracy", "mean", "over", "subjects", "difference", "to", "the", "first"]
    assert [line.split("  ")[0] for line in lines[2:5]] == ["none", "nf4", "nf4 + DQ"]
    assert lines[5].split("  ")[0] == "codebook" and "STEM" in lines[5]  # MMLU's subjects have categories
    assert lines[-2].startswith("4 questions of mmlu, 1 example, texts; brackets: 95 % intervals")
    assert re.fullmatch(r"rules that read no question: [\w' ]+ \d+.\d%, [\w' ]+ \d+.\d%; guessing 25 %", lines[-1])
    code, out, _ = run(capsys, folder, *options, "--json")
    records = json.loads(out)
    rows = read_choices(results)
    assert code == 0 and len(rows) == len(records) == 3
    want = accuracies(rows[1], "acc_norm").over_questions
    assert records[1]["acc_norm"]["over_questions"] == pytest.approx([want.mean, want.low, want.high], abs=1e-6)
    assert records[0]["acc"]["difference"] is None and len(records[2]["acc"]["difference"]) == 3
    assert set(records[0]["acc"]["subjects"]) == {"abstract_algebra", "anatomy"}


def test_double_quantization_is_on_as_in_load(capsys, folder, data, results):
    options = ["--codebooks", "nf4", "--data", data, "--shots", 1, "--out", results, "--quiet"]
    code, out, _ = run(capsys, folder, *options)
    assert code == 0 and out.splitlines()[1].startswith("nf4 + DQ ")
    assert [row["double_quant"] for row in read_choices(results)] == [True]


def test_a_file_of_whole_prompts(capsys, folder, tmp_path, results):
    path = tmp_path / "zero_shot.json"
    path.write_text(json.dumps(AUTHORS) + "\n")
    code, out, _ = run(capsys, folder, "--data", path, "--out", results, "--quiet")
    assert code == 0 and "1 question of zero_shot, 0 examples, letters" in out
    assert "rules" not in out  # the options are not known apart


@pytest.mark.parametrize(
    "options, said",
    [
        (["--questions", "0"], "questions=0 is not allowed"),
        (["--shots", "3"], "has 2 examples in dev/abstract_algebra_dev.csv, but shots=3: take --shots 2"),
        (["--codebooks", "nf9"], "'nf9' is not known"),
        (["--codebooks", "lloyd-max"], "codebook 'lloyd-max' is fitted or made by hand"),
        (["--seed", "-1"], "seed=-1 is not allowed"),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--adapter", "nowhere"], "nowhere has no adapter_config.json"),
        (["--out", ""], "the path is empty"),
        (["--block-size", "7"], "block_size=7"),
    ],
)
def test_a_mistake_is_one_line(capsys, monkeypatch, tmp_path, folder, data, results, options, said):
    monkeypatch.chdir(tmp_path)
    given = ["--data", data, "--shots", 1, "--out", results, "--quiet"]
    code, out, err = run(capsys, folder, *given, *options)  # of two equal options the last counts
    assert code == 2 and out == "" and err.count("\n") == 1 and said in err, err
    assert not results.exists()


def test_a_folder_in_4_bits_is_refused(capsys, tmp_path, folder, data, results):
    from qlora_lab.model.quantized_folder import quantize_folder

    quantize_folder(folder, tmp_path / "packed", progress=False)
    code, _, err = run(capsys, tmp_path / "packed", "--data", data, "--out", results, "--quiet")
    assert code == 2 and "is quantised already" in err


def test_a_line_outside_the_form_ends_the_command(capsys, folder, data, results):
    (data / "test" / "anatomy_test.csv").write_text("the sum,1,2,3,4\n")
    code, _, err = run(capsys, folder, "--data", data, "--out", results, "--quiet")
    assert code == 2 and err.count("\n") == 1 and "anatomy_test.csv, line 1 has 5 columns, but needs 6" in err
