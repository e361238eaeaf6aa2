"""Systems that answer: the model's own answers, each kept, and none asked for twice."""

import json
import os
import re
from itertools import product

import pytest
import torch

import qlora_lab as ql
from qlora_lab.adapters.lora import add_lora, lora_layers
from qlora_lab.files.results_file import STARTS, append_result, read_results
from qlora_lab.measure import answers as module
from qlora_lab.measure.answers import ANSWERS, System, answer_all, check_systems, check_unchanged, systems
from qlora_lab.measure.held_out import generate_answers
from qlora_lab.measure.judges import Question

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # an adapter plays on every data type, and load_adapter says where that is not the one it was trained beside
    pytest.mark.filterwarnings("ignore:the adapter in .* was trained beside:UserWarning"),
]
QUESTIONS = [Question(f"q{i}", f"double {i}", str(2 * i)) for i in range(3)]
SHORT = {"max_new_tokens": 3, "progress": False}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "there" / "answers.jsonl"


@pytest.fixture
def adapter(folder, tmp_path):
    """One that changes answers."""
    return trained(folder, tmp_path / "adapter", 1.0)


def trained(folder, path, value):
    model, _ = ql.load(folder, None, progress=False)
    add_lora(model, r=2)
    for layer in lora_layers(model).values():
        layer.lora_B.data.fill_(value)
    return ql.save_adapter(model, path)


@pytest.fixture
def loads(monkeypatch):
    """The data types that were loaded; `stop` raises KeyboardInterrupt instead of the load of that number."""
    seen = {"codebooks": [], "stop": None}
    real = module.load

    def load(name, codebook, *given, **options):
        if len(seen["codebooks"]) == seen["stop"]:
            raise KeyboardInterrupt
        seen["codebooks"].append(codebook)
        return real(name, codebook, *given, **options)

    monkeypatch.setattr(module, "load", load)
    return seen


@pytest.mark.long
def test_each_system_answers_as_it_does_alone(folder, adapter, out):
    answers = answer_all(folder, systems([None, "int4"], [adapter]), QUESTIONS, out, **SHORT)
    assert list(answers) == ["none", f"none + {adapter}", "int4", f"int4 + {adapter}"]
    examples = [question.answered(question.reference) for question in QUESTIONS]
    for (codebook, path), found in zip(product((None, "int4"), (None, adapter)), answers.values(), strict=True):
        model, tokenizer = ql.load(folder, codebook, dtype=torch.float32, device="cpu", progress=False)
        if path:
            ql.load_adapter(model, path)
        assert list(found.values()) == generate_answers(model, tokenizer, examples, 3, progress=False)
    assert len({json.dumps(found) for found in answers.values()}) > 2  # the adapter changes answers


@pytest.mark.long
def test_nothing_is_asked_twice(folder, out, loads):
    given = folder, systems([None, "nf4"]), QUESTIONS, out
    answers = answer_all(*given, **SHORT)
    before = out.read_bytes()
    assert answer_all(*given, **SHORT) == answers
    assert out.read_bytes() == before and loads["codebooks"] == [None, "nf4"]  # no model was loaded again
    more = answer_all(folder, systems([None, "nf4"]), [*QUESTIONS, Question("q9", "double 9", "18")], out, **SHORT)
    assert len(out.read_text().splitlines()) == 8 and {name: more[name]["q0"] for name in more} == {
        name: answers[name]["q0"] for name in answers
    }


@pytest.mark.slow
def test_a_model_that_was_moved_is_not_asked_again(folder, out, loads):
    answers = answer_all(folder, systems([None, "nf4"]), QUESTIONS, out, **SHORT)
    moved = folder.rename(folder.with_name("moved"))
    assert answer_all(moved, systems([None, "nf4"]), QUESTIONS, out, **SHORT) == answers
    assert loads["codebooks"] == [None, "nf4"]


@pytest.mark.long
def test_an_interrupt_keeps_what_was_answered(folder, out, loads):
    loads["stop"] = 1
    with pytest.raises(KeyboardInterrupt, match=r"3 of 6 answers are in .*answers.jsonl; the same call goes on"):
        answer_all(folder, systems([None, "nf4"]), QUESTIONS, out, **SHORT)
    loads["stop"] = None
    answer_all(folder, systems([None, "nf4"]), QUESTIONS, out, **SHORT)
    assert loads["codebooks"] == [None, "nf4"]


def test_an_interrupt_counts_answers_of_a_system_that_is_not_done(folder, out, monkeypatch):
    calls = []

    def stopped(file, row):
        calls.append(row)
        if len(calls) == 3:
            raise KeyboardInterrupt
        append_result(file, row)

    monkeypatch.setattr(module, "append_result", stopped)
    with pytest.raises(KeyboardInterrupt, match=r"2 of 6 answers are in .*answers.jsonl; the same call goes on"):
        answer_all(folder, systems([None, "nf4"]), QUESTIONS, out, **SHORT)
    assert len(out.read_text().splitlines()) == 2


@pytest.mark.long
def test_the_progress_bar_prints_no_control_characters(folder, tmp_path, out, capsys):
    players = [System("a\x1b[2Jb", None), System("ä\r", "nf4")]
    answer_all(folder, players, QUESTIONS, out, max_new_tokens=3, progress=True)
    err = capsys.readouterr().err
    assert r"a\x1b[2Jb" in err and "\x1b[2J" not in err and r"ä\r]" in err


@pytest.mark.long
def test_a_system_that_changed_is_told_without_a_load(folder, adapter, out, loads):
    players = [System("a", None), System("b", "nf4", adapter=adapter)]
    check_unchanged(folder, players, out, **SHORT)  # no file yet
    answer_all(folder, players, QUESTIONS, out, **SHORT)
    del loads["codebooks"][:]
    trained(folder, adapter, -1.0)
    with pytest.raises(ValueError, match=r"may differ: the adapter has changed \(b\): name another"):
        check_unchanged(folder, players, out, **SHORT)
    check_unchanged(folder, players[:1], out, **SHORT)
    check_unchanged(folder, [System("b", None)], out.with_name("other"), **SHORT)
    assert loads["codebooks"] == []


@pytest.mark.slow
def test_one_model_is_in_memory_at_a_time(folder, out, monkeypatch):
    import gc
    import weakref

    alive = []
    real = module.load

    def load(*given, **options):
        assert [model for model in alive if model() is not None] == []
        model, tokenizer = real(*given, **options)
        alive.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(module, "load", load)
    gc.collect()
    answer_all(folder, systems([None, "nf4", "int4"]), QUESTIONS, out, **SHORT)
    assert len(alive) == 3


@pytest.mark.slow
@pytest.mark.parametrize("what", ["adapter", "prompt", "tokens", "block size"])
def test_what_decides_an_answer_asks_anew(folder, adapter, out, tmp_path, loads, what):
    players = [System("a", None), System("b", "nf4", adapter=adapter)]
    answer_all(folder, players, QUESTIONS, out, **SHORT)
    questions, options = QUESTIONS, SHORT
    if what == "adapter":
        trained(folder, adapter, -1.0)
    elif what == "prompt":
        questions = [Question(q.id, q.prompt + "?", q.reference) for q in QUESTIONS]
    elif what == "tokens":
        options = SHORT | {"max_new_tokens": 2}
    else:
        players[1] = System("b", "nf4", 32, adapter=adapter)
    del loads["codebooks"][:]
    answer_all(folder, players, questions, out, **options)
    both = what in ("prompt", "tokens")
    assert loads["codebooks"] == ([None, "nf4"] if both else ["nf4"])


@pytest.mark.long
def test_an_edited_quantiser_answers_anew_and_a_commit_does_not(folder, out, loads, monkeypatch):
    answer_all(folder, systems([None, "nf4"]), QUESTIONS, out, **SHORT)
    monkeypatch.setattr("qlora_lab.measure.sweep.commit", lambda: "another")
    answer_all(folder, systems([None, "nf4"]), QUESTIONS, out, **SHORT)
    assert loads["codebooks"] == [None, "nf4"]
    monkeypatch.setattr("qlora_lab.measure.sweep._quantiser", lambda variant, device: "edited")
    answer_all(folder, systems([None, "nf4"]), QUESTIONS, out, **SHORT)
    assert loads["codebooks"] == [None, "nf4", "nf4"]  # the unquantised model has no quantiser


@pytest.mark.slow
def test_a_row_says_whose_answer_it_is(folder, out):
    answer_all(folder, systems([None, "nf4"], block_size=32, double_quant=False), QUESTIONS, out, **SHORT)
    rows = read_results(out, ANSWERS)
    whole, nf4 = (row["system"] for row in rows[::3])
    assert rows[0]["model"] == {"name": str(folder), "source": "a local folder"}
    assert whole["codebook"] is None and whole["block_size"] is None and whole["double_quant"] is None
    assert nf4["config"] == {"max_new_tokens": 3, "dtype": "float32", "device": "cpu"} and whole["quantiser"] is None
    assert re.fullmatch("[0-9a-f]{16}", nf4["quantiser"]) and {"commit", "machine"} <= rows[0].keys()
    assert (nf4["name"], nf4["block_size"], nf4["double_quant"], nf4["adapter"]) == ("nf4", 32, False, None)
    assert re.fullmatch("[0-9a-f]{64}", nf4["weights_sha256"]) and "torch" in nf4["versions"]
    assert ANSWERS.start in STARTS and out.read_bytes().startswith(ANSWERS.start)


@pytest.mark.parametrize(
    "players, said",
    [
        ([], "no system; a tournament needs two or more"),
        ([System("a")], "only one system: 'a'; a tournament needs two or more"),
        ([System("a"), System("a", None)], "system 'a' is there twice"),
        ([System("a"), System("", None)], "a system's name is ''"),
        ([System("a", adapter="ad"), System("b", adapter="x/../ad")], "adapters 'ad' and 'x/../ad' are one, "),
        ([System("a"), System("b", "nf5")], "nf5"),
        ([System("a"), System("b", "nf4", 8)], "block_size=8 is not allowed"),
        ([System("a"), System("b", adapter="nowhere")], "nowhere is not a folder"),
    ],
)
def test_systems_that_cannot_play_are_refused_before_a_model_is_read(out, players, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        answer_all("no model", players, QUESTIONS, out, **SHORT)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        check_systems(players)
    assert not out.parent.exists()


def test_a_model_in_4_bits_is_refused(folder, tmp_path, out):
    ql.quantize_folder(folder, tmp_path / "small", progress=False)
    with pytest.raises(ValueError, match="is quantised already, as .*: a tournament starts from the original"):
        answer_all(tmp_path / "small", systems([None, "nf4"]), QUESTIONS, out, **SHORT)
    assert not os.path.lexists(out)  # a file without a row is removed again


def test_numbers_and_paths_at_the_edge(folder, out):
    players = systems([None, "nf4"])
    with pytest.raises(ValueError, match="max_new_tokens=0 is not allowed"):
        answer_all(folder, players, QUESTIONS, out, max_new_tokens=0)
    with pytest.raises(ValueError, match="the path is empty"):
        answer_all(folder, players, QUESTIONS, "")
