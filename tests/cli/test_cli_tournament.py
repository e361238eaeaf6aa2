"""`qlora-lab tournament`: answers, games, a table and a page; existing games; a mistake is one line and code 2."""

import json
import os
import re
import shutil
from html.parser import HTMLParser

import pytest

import qlora_lab as ql
from qlora_lab import cli
from qlora_lab.adapters.lora import add_lora, lora_layers
from qlora_lab.cli import tournament as command
from qlora_lab.data.examples import Example
from qlora_lab.files.lock import locked_folder
from qlora_lab.measure import answers as answering, play as playing
from qlora_lab.measure.judges import ReferenceJudge
from qlora_lab.show.tournament_page import START

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the adapter in .* was trained beside:UserWarning"),
]
EXAMPLES = [Example((("user", f"double {i} $x$ <b>"), ("assistant", f"Return {2 * i}."))) for i in range(8)]
SMALL = ["--codebooks", "none", "int2", "--questions", "4", "--max-new-tokens", "4", "--quiet"]


@pytest.fixture
def model(folder, monkeypatch):
    monkeypatch.setattr("qlora_lab.data.dataset.docstring_split", lambda split, progress: EXAMPLES)
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "games"


def run(capsys, *argv):
    capsys.readouterr()  # what saving the model said
    code = cli.main(["tournament", *(str(a) for a in argv)])
    text, err = capsys.readouterr()
    return code, text, err


def write_adapter(folder, path):
    model, _ = ql.load(folder, None, progress=False)
    add_lora(model, r=2)
    for layer in lora_layers(model).values():
        layer.lora_B.data.fill_(1.0)
    return ql.save_adapter(model, path)


# ------------------------------------------------------------------------------------------------------- it is played


@pytest.mark.long
def test_data_types_and_an_adapter_play_every_game(capsys, tmp_path, model, out):
    adapter = write_adapter(model, tmp_path / "adapter")
    code, text, _ = run(capsys, model, *SMALL, "--adapters", adapter, "--out", out, "--json")
    found = json.loads(text)
    assert code == 0 and sorted(p.name for p in out.iterdir()) == ["answers.jsonl", "games.jsonl", "results.html"]
    names = ["none", f"none + {adapter}", "int2", f"int2 + {adapter}"]
    assert {row["system"] for row in found["systems"]} == {*names}
    rows = [json.loads(line) for line in (out / "games.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 4 * 3 and all(row["games"] == 4 * 3 * 2 for row in found["systems"])
    assert (
        found["judge"]["contradictions"] == 0 and found["unread"] == [] and found["page"] == str(out / "results.html")
    )
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, text, err = run(capsys, model, *SMALL, "--adapters", adapter, "--out", out)  # nothing is asked again
    assert code == 0 and err == "" and before == {path.name: path.read_bytes() for path in out.iterdir()}
    head, *lines = text.splitlines()
    assert " ".join(head.split()) == "system Elo Bradley-Terry (95 %) rank games unread"
    points = [int(re.search(r"  +(\d+) ± \d+", line)[1]) for line in lines[:4]]
    assert points == sorted(points, reverse=True) and "Judge: rouge." in text


@pytest.mark.long
def test_a_broken_judge_is_unmasked(capsys, model, out):
    options = ["--codebooks", "none", "int2", "int3", "--questions", 8, "--judge", "always-first", "--out", out]
    code, text, _ = run(capsys, model, *SMALL, *options)
    assert code == 0 and "The first answer won 100% of 48 decided games, and 24 of 24 pairs changed" in text
    assert "this judge reads positions, not answers." in text and "Bradley-Terry gives no rating: " in text
    found = json.loads(run(capsys, "--games", out, "--json")[1])
    assert found["judge"]["is_broken"] and "the first answer won all decided games" in found["no_rating"]
    assert all(row["rating"] is None and row["ranks"] is None for row in found["systems"])


@pytest.mark.slow
@pytest.mark.parametrize("judge", ["logprob", "logprob-sum"])
def test_a_model_judges(capsys, model, out, judge):
    code, text, _ = run(capsys, model, *SMALL, "--judge", judge, "--judge-model", model, "--out", out)
    assert code == 0 and f"log-probability {'in sum' if judge.endswith('sum') else 'per token'} by" in text


@pytest.mark.long
def test_an_interrupted_tournament_asks_nobody_twice(capsys, model, out, monkeypatch):
    asked = []

    def judge(self, question, a, b):
        asked.append((question.id, a, b))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return "first" if a > b else "second" if b > a else "tie"

    monkeypatch.setattr(ReferenceJudge, "__call__", judge)
    code, _, err = run(capsys, model, *SMALL, "--out", out)
    assert code == 130 and "2 of 8 games are in" in err
    monkeypatch.setattr(answering, "load", None)  # all answers are there
    code, _, err = run(capsys, model, *SMALL, "--out", out)
    assert code == 0 and len(asked) == 9  # the third was asked, but gave no verdict


@pytest.mark.long
def test_a_judge_that_fails_is_counted_and_named(capsys, model, out, monkeypatch):
    calls = []

    def judge(self, question, a, b):
        calls.append(a)
        if len(calls) in (2, 3):
            raise ConnectionError("the line is dead")
        return "first" if a > b else "second" if b > a else "tie"

    monkeypatch.setattr(ReferenceJudge, "__call__", judge)
    code, text, _ = run(capsys, model, *SMALL, "--out", out)
    assert code == 0 and "2 verdicts could not be read and were left out; the first: question " in text
    assert "'int2' against 'none' (the judge raised ConnectionError('the line is dead'))" in text
    found = json.loads(run(capsys, model, *SMALL, "--out", out, "--json")[1])
    assert len(found["unread"]) == 2 and all(row["unread"] == 2 for row in found["systems"])
    assert found["unread"][0].keys() == {"question", "first", "second", "reason"}


@pytest.mark.slow
def test_a_judge_that_always_fails_is_one_line(capsys, model, out, monkeypatch):
    monkeypatch.setattr(ReferenceJudge, "__call__", lambda *_: "A is better")
    code, text, err = run(capsys, model, *SMALL, "--out", out)
    assert (code, text) == (2, "") and err.count("\n") == 1
    assert "no verdict of 8 could be read, so nothing can be rated; the first: the judge returned 'A is better'" in err
    assert len((out / "games.jsonl").read_text().splitlines()) == 8  # kept


# ----------------------------------------------------------------------------------------------------------- the page


class Elements(HTMLParser):
    """Names of elements, and their texts."""

    def __init__(self):
        super().__init__()
        self.tags, self.texts = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not {name for name, _ in attributes} & {"src", "href", "onload"}  # nothing is fetched or run

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.long
def test_the_page_shows_answers_letter_by_letter(capsys, model, out, monkeypatch):
    hostile = "<script>alert(1)</script> $\\alpha$ </pre><img src=x onerror=y> \x1b[2J & \ud800 \u202e back"
    monkeypatch.setattr(answering, "generate_answers", lambda model, tokenizer, examples, *_, **__: [
        hostile if i else "Return 0." for i in range(len(examples))])  # fmt: skip
    code, _, err = run(capsys, model, *SMALL, "--out", out)
    assert code == 0, err
    page = (out / "results.html").read_text("utf-8")
    assert page.startswith(START)
    seen = Elements()
    seen.feed(page)
    assert {"script", "img", "b"}.isdisjoint(seen.tags) and "pre" in seen.tags and "section" in seen.tags
    text = "".join(seen.texts)
    assert hostile.replace("\x1b", r"\x1b").replace("\ud800", r"\ud800") in text and "double 3 $x$ <b>" in text
    assert text.count("won ") == 4 * 2 and "default-src 'none'" in page


# ------------------------------------------------------------------------------------------------------ existing games


def write_games(path, rows):
    path.write_text(
        "".join(
            json.dumps(dict(zip(("question", "first", "second", "verdict"), row, strict=True))) + "\n" for row in rows
        )
    )
    return path


def both_orders(systems="ab", questions=9):
    """Games in which "a" wins two questions of three against "b", and so on."""
    rows = []
    for q in range(questions):
        for x, y in (pair for i, x in enumerate(systems) for pair in ((x, y) for y in systems[i + 1 :])):
            best = x if q % 3 else y
            rows += [
                (str(q), x, y, "first" if best == x else "second"),
                (str(q), y, x, "first" if best == y else "second"),
            ]
    return rows


def test_games_of_ones_own_are_rated(capsys, tmp_path):
    path = write_games(tmp_path / "mine.jsonl", both_orders("abc"))
    code, text, err = run(capsys, "--games", path)
    assert code == 0 and err == "" and [line.split()[0] for line in text.splitlines()[1:4]] == ["a", "b", "c"]
    assert "no favoured position was seen" in text and "results.html" not in text


@pytest.mark.slow
def test_games_that_were_played_are_rated_again_from_their_folder(capsys, model, out):
    played = json.loads(run(capsys, model, *SMALL, "--out", out, "--json")[1])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    again = json.loads(run(capsys, "--games", out, "--json")[1])
    assert again["systems"] == played["systems"] and again["judge"] == played["judge"]
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_names_in_a_file_cannot_move_the_cursor(capsys, tmp_path):
    rows = [(q, *(f"{name}\x1b[2J" for name in pair), verdict) for q, *pair, verdict in both_orders()]
    code, text, _ = run(capsys, "--games", write_games(tmp_path / "mine.jsonl", rows))
    assert code == 0 and "\x1b" not in text and r"a\x1b[2J" in text


def test_counts_say_what_their_intervals_are_over(capsys, tmp_path):
    path = tmp_path / "counts.csv"
    path.write_text("first,second,first_wins,second_wins,ties,unparsed\na,b,30,20,5,1\nb,a,35,15,4,0\n")
    code, text, _ = run(capsys, "--games", path)
    assert code == 0 and "ranks come from resampled games" in text and "so both are too narrow" in text
    assert "\n1 verdict could not be read and was left out.\n" in text
    assert "with as many games in either order" not in text  # 56 in one, 54 in the other


@pytest.mark.long
def test_who_wins_all_has_no_finite_rating(capsys, tmp_path):
    rows = both_orders("ab") + [(q, *pair, verdict) for q in "012" for pair, verdict in
                                ((("w", "a"), "first"), (("a", "w"), "second"))]  # fmt: skip
    path = write_games(tmp_path / "mine.jsonl", rows)
    assert "won all" in run(capsys, "--games", path)[1]
    first = json.loads(run(capsys, "--games", path, "--json")[1])["systems"][0]
    assert first["system"] == "w" and first["rating"] == {"value": None, "low": None, "high": None}
    assert first["says"] == "won all"


@pytest.mark.long
def test_an_open_end_is_a_word_and_null(capsys, tmp_path):
    rows = both_orders("ab", 20)
    better = {"a": "first", "b": "second"}  # "a" wins all but question 0, so a third of the resamples are all its own
    rows = [(q, x, y, {"0": better[y]}.get(q, better[x])) for q, x, y, _ in rows]
    path = write_games(tmp_path / "mine.jsonl", rows)
    text = run(capsys, "--games", path)[1]
    assert re.search(r"^a .* \d+ \(\d+ and more\) ", text, re.M) and re.search(r"^b .* \(\d+ and less\) ", text, re.M)
    first, second = json.loads(run(capsys, "--games", path, "--json")[1])["systems"]
    assert first["rating"]["high"] is None and second["rating"]["low"] is None and "and more" in first["says"]


def test_resamples_that_rate_nobody_are_told(capsys, tmp_path):
    rows = [(str(q), *pair, "first" if q else "second") for q in range(8) for pair in ("ab", "ba")]
    text = run(capsys, "--games", write_games(tmp_path / "mine.jsonl", rows))[1]
    assert re.search(r"^3\d% of the resampled tournaments rate nobody and were left out, so intervals", text, re.M)


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "options, said",
    [
        (["--codebooks", "none", "nf5"], "nf5"),
        (["--codebooks", "none"], "only one system: 'none'; a tournament needs two or more"),
        (["--codebooks", "nf4", "nf4"], "system 'nf4' is there twice"),
        (["--adapters", "ad", "./ad"], "adapters 'ad' and './ad' are one, "),
        (["--adapters", "nowhere"], "nowhere is not a folder"),
        (["--adapters", "MODEL"], "has no adapter_config.json"),
        (["--adapters", ""], ". has no adapter_config.json"),
        (["--block-size", "8"], "block_size=8 is not allowed"),
        (["--questions", "0"], "questions=0 is not allowed: it is a whole number of at least 1"),
        (["--questions", "9"], "--questions is 9, but there are 8 held-out docstrings: take fewer"),
        (["--max-new-tokens", "0"], "max-new-tokens=0 is not allowed"),
        (["--judge-model", "MODEL"], "--judge-model is given, but --judge rouge asks no model"),
        (["--judge", "logprob", "--judge-model", "nowhere"], "'nowhere'"),
        (["--out", ""], "the path is empty"),
        (["--out", "FILE"], "is a file, but a tournament needs a folder"),
        (["--out", "MODEL"], "and no tournament: name a new or empty folder"),
        (["--out", "INSIDE"], "lies inside"),
        (["--games", "FILE"], "give either a model"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(capsys, tmp_path, model, out, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("notes\n")
    names = {"MODEL": model, "FILE": tmp_path / "file", "INSIDE": model / "games"}
    code, text, err = run(capsys, model, "--out", out, *SMALL, *(names.get(word, word) for word in options))
    assert (code, text) == (2, "") and said in err and err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "notes\n" and not out.exists()


@pytest.mark.parametrize(
    "argv, said",
    [
        ([], "give either a model, whose data types play, or --games"),
        (["model"], "--out is missing"),
        (["--games", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--games", ""], "the path is empty"),
        (["--games", "EMPTY"], "holds no .jsonl file"),
        (["--games", "BAD"], "bad.jsonl, line 2"),
        (["--games", "BAD.csv"], "bad.csv, line 1 lacks"),
        (["--games", "NONE"], "none.jsonl"),
        (["--games", "APART"], "never met in a game with a verdict: 'a', 'b' | 'c', 'd'"),
        (["--games", "UNREAD"], "no game can be rated: of 2 verdicts, 2 could not be read"),
        (["--games", "GOOD", "--out", "there"], "--out is given with --games, which only rates: leave it out"),
        (["--games", "GOOD", "--judge", "logprob", "--no-double-quant"], "--no-double-quant, --judge are given with"),
        (["--games", "GOOD", "--codebooks", "nf4"], "--codebooks is given with --games"),
        (["--games", "GOOD", "--block-size", "32"], "--block-size is given with --games"),
        (["--games", "GOOD", "--adapters", "x"], "--adapters is given with --games"),
        (["--games", "GOOD", "--questions", "3"], "--questions is given with --games"),
        (["--games", "GOOD", "--max-new-tokens", "3"], "--max-new-tokens is given with --games"),
        (["--games", "GOOD", "--judge-model", "x"], "--judge-model is given with --games"),
    ],
)
def test_games_that_cannot_be_rated_are_one_line(capsys, tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    (tmp_path / "none.jsonl").touch()
    games = {"BAD": [*both_orders()[:1], ("q", "a", "b", "A")], "APART": both_orders("ab") + both_orders("cd")}
    games |= {"UNREAD": [("q", "a", "b", "unread"), ("q", "b", "a", "unread")], "GOOD": both_orders()}
    names = {name: write_games(tmp_path / f"{name.lower()}.jsonl", rows) for name, rows in games.items()}
    names |= {"EMPTY": tmp_path / "empty", "BAD.csv": tmp_path / "bad.csv", "NONE": tmp_path / "none.jsonl"}
    code, text, err = run(capsys, *(names.get(word, word) for word in argv))
    assert (code, text) == (2, "") and said in err and err.count("\n") == 1
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("word", ["gpt-4", ""])
def test_a_judge_that_is_not_known(capsys, word):
    with pytest.raises(SystemExit) as stop:
        cli.main(["tournament", "model", "--out", "games", "--judge", word])
    assert stop.value.code == 2 and "always-first" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize(
    "options, said",
    [
        (["--judge", "always-first"], "its judge is 'rouge', not 'always-first'"),
        pytest.param(["--questions", "3"], "its questions are 4, with checksum", marks=pytest.mark.slow),
        pytest.param(
            ["--codebooks", "none", "int3"], "it has the systems 'int2' too; it lacks", marks=pytest.mark.slow
        ),
    ],
)
def test_another_tournament_is_refused_before_a_model_is_loaded(capsys, model, out, monkeypatch, options, said):
    run(capsys, model, *SMALL, "--out", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(answering, "load", None)
    code, text, err = run(capsys, model, *SMALL, "--out", out, *options)
    assert (code, text) == (2, "") and said in err and err.count("\n") == 1
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.long
def test_what_changes_answers_is_told_before_a_model_is_loaded(capsys, model, out, monkeypatch):
    run(capsys, model, *SMALL, "--out", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(answering, "load", None)
    code, text, err = run(capsys, model, *SMALL, "--out", out, "--block-size", 32, "--max-new-tokens", 2)
    assert (code, text) == (2, "") and "max_new_tokens has changed from 4 to 2 (none, int2)" in err
    assert "block_size has changed from 64 to 32 (int2)" in err and err.count("\n") == 1
    with (model / "config.json").open("a") as file:
        file.write(" ")
    code, text, err = run(capsys, model, *SMALL, "--out", out)
    assert code == 2 and "the model's config.json has changed (none, int2)" in err
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.slow
def test_answers_that_changed_are_refused(capsys, model, out):
    """Without the rows of the earlier answers, their checksums in the games still tell."""
    run(capsys, model, *SMALL, "--out", out)
    (out / "answers.jsonl").unlink()
    code, _, err = run(capsys, model, *SMALL, "--out", out, "--block-size", 32, "--max-new-tokens", 2)
    assert code == 2 and "the answers of 'none', 'int2' have changed" in err


def test_too_little_memory_for_games_gives_no_advice_about_models(capsys, tmp_path, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr("qlora_lab.measure.standings.standings", full)
    code, _, err = run(capsys, "--games", write_games(tmp_path / "mine.jsonl", both_orders()))
    assert code == 2 and "out of memory: close other programs, or rate fewer games" in err


@pytest.mark.parametrize("name", ["results.html", "games.jsonl", "answers.jsonl", "notes.txt"])
def test_a_users_file_is_kept(capsys, model, out, name):
    out.mkdir()
    (out / name).write_text("notes of mine\n")
    code, _, err = run(capsys, model, *SMALL, "--out", out)
    assert code == 2 and err.count("\n") == 1 and (out / name).read_text() == "notes of mine\n"
    assert [path.name for path in out.iterdir()] == [name]


@pytest.mark.slow
def test_a_users_page_beside_a_tournament_is_kept(capsys, model, out):
    run(capsys, model, *SMALL, "--out", out)
    (out / "results.html").write_text("<html>mine")
    code, _, err = run(capsys, model, *SMALL, "--out", out)
    assert code == 2 and "results.html was not written by a tournament, so it is kept" in err
    assert (out / "results.html").read_text() == "<html>mine"


def test_two_tournaments_at_once_into_one_folder(capsys, out):
    with locked_folder(out, "tournament"):
        code, _, err = run(capsys, "nowhere", *SMALL, "--out", out)
    assert code == 2 and "is in use by this very process (tournament)" in err
    assert not out.exists()


@pytest.mark.slow
def test_a_full_disk_keeps_what_was_played(capsys, model, out, monkeypatch):
    real, rows = playing.append_result, []

    def full(file, row):
        rows.append(row)
        if len(rows) == 5:
            raise OSError("games.jsonl: a row cannot be written (No space left on device); earlier rows are safe")
        real(file, row)

    monkeypatch.setattr(playing, "append_result", full)
    code, _, err = run(capsys, model, *SMALL, "--out", out)
    assert code == 2 and "earlier rows are safe" in err and len((out / "games.jsonl").read_text().splitlines()) == 4
    monkeypatch.undo()


@pytest.mark.slow
def test_an_answer_file_may_be_copied_for_another_judge(capsys, model, out, monkeypatch):
    run(capsys, model, *SMALL, "--out", out)
    other = out.with_name("other")
    other.mkdir()
    shutil.copy(out / "answers.jsonl", other)
    monkeypatch.setattr(answering, "load", None)
    assert run(capsys, model, *SMALL, "--judge", "always-first", "--out", other)[0] == 0


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["tournament", "--help"])
    assert stop.value.code == 0 and command.EXAMPLE in " ".join(capsys.readouterr().out.split())
    assert not os.path.exists("runs/games")


@pytest.mark.slow
def test_the_default_model_plays(capsys, out):
    """Two questions, two data types, and a judge that reads references."""
    options = ["--codebooks", "nf4", "int4", "--questions", 2, "--max-new-tokens", 8, "--quiet", "--json"]
    code, text, _ = run(capsys, "smollm2-135m", *options, "--out", out)
    assert code == 0 and json.loads(text)["judge"]["contradictions"] == 0
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(row["answer"] for row in rows)
