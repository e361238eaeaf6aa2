"""Published tables: as printed, each row with its source; a damaged file is named with its line."""

import csv
from dataclasses import astuple, fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from qlora_lab.files.course import course_path
from qlora_lab.measure import published as module
from qlora_lab.measure.games import VERDICTS
from qlora_lab.measure.published import (
    Chatbot,
    Claim,
    Elo,
    Glue,
    LlavaFinding,
    Mmlu,
    PairCount,
    Perplexity,
    RelativeQuestions,
    RelativeTotals,
    published,
    published_games,
    read_rows,
    relative_totals,
)

TABLES = {"perplexity": Perplexity, "mmlu": Mmlu, "glue": Glue, "elo": Elo, "chatgpt": Chatbot, "claims": Claim}
TABLES |= {"llava": LlavaFinding}
COUNTED = {"guanaco_vicuna_pairs": PairCount, "guanaco_oa_pairs": PairCount}
COUNTED |= {"guanaco_relative_totals": RelativeTotals, "guanaco_relative_questions": RelativeQuestions}
# rows that the paper prints: table 2 has 4; 4 and 5 have 27 and 36; 3 has 34 figures; 1 and 7 have 8 and 31; 6 has 21
ROWS = {"perplexity": 4, "mmlu": 63, "glue": 34, "elo": 39, "chatgpt": 21}


@pytest.mark.parametrize("name", TABLES)
def test_each_row_names_its_source(name):
    rows = published(f"{name}.csv", TABLES[name])
    assert len(rows) == ROWS.get(name, len(rows)) and len(set(map(astuple, rows))) == len(rows)
    assert all(("arXiv 2305.14314" in row.source) or row.source.startswith(("slides, ", "AI weekly")) for row in rows)
    assert fields(TABLES[name])[-1].name == "erratum"


@pytest.mark.parametrize("name", COUNTED)
def test_the_counted_judgments_name_theirs(name):
    first = course_path("data", "published", f"{name}.csv").read_text("utf-8").partition("\n")[0]
    assert first.startswith("# source: ") and "artidoro/qlora (MIT licence)" in first and "eval/ratings-gpt4" in first


def test_the_readme_lists_each_file():
    folder = course_path("data", "published")
    text = (folder / "README.md").read_text("utf-8").replace("guanaco_*", " ".join(COUNTED))
    assert all(path.stem in text for path in folder.iterdir() if path.name != "README.md")


def test_figures_are_as_printed():
    """A row or a column of each table, from the paper."""
    mmlu = {(row.table, row.data_type, row.data, row.size): row.accuracy for row in published("mmlu.csv", Mmlu)}
    sizes = ("7B", "13B", "33B", "65B")
    assert [mmlu[4, "Float4", "FLAN v2", size] for size in sizes] == ["44.0", "50.0", "58.5", "63.3"]
    assert [mmlu[5, "LLaMA", "none", size] for size in sizes] == ["35.1", "46.9", "57.8", "63.4"]
    glue = [row.value for row in published("glue.csv", Glue) if row.data_type == "Int8"]
    assert glue == ["88.8", "40.4", "42.9", "45.4", "56.5", "60.7"]
    elo = {(row.table, row.benchmark, row.judge, row.system): row for row in published("elo.csv", Elo)}
    assert elo[7, "Vicuna", "people", "Guanaco 7B"].elo == "1010" and elo[7, "all", "median", "Bard"].rank == "8"
    assert (7, "Open Assistant", "GPT-4", "Bard") not in elo
    assert elo[1, "Vicuna", "GPT-4", "Vicuna 13B"].memory_gb == "26"
    row = next(row for row in published("chatgpt.csv", Chatbot) if (row.system, row.size) == ("Guanaco", "65B"))
    assert (row.chatgpt_first, row.system_first, row.mean, row.interval) == ("96.7", "101.9", "99.3", "4.4")


def test_columns_have_their_sums():
    """Sums of columns as printed: a digit that is changed by accident is noticed."""
    mmlu = [row for row in published("mmlu.csv", Mmlu) if row.table == 5]
    sums = [sum(float(row.accuracy) for row in mmlu if row.size == size) for size in ("7B", "13B", "33B", "65B")]
    assert sums == pytest.approx([334.8, 403.3, 507.6, 549.6])
    glue = published("glue.csv", Glue)
    sums = [sum(float(row.value) for row in glue if row.model.endswith(size)) for size in ("large", "3B", "11B")]
    assert sums == pytest.approx([443.4, 332.0, 305.2])
    elo = [row for row in published("elo.csv", Elo) if row.elo]
    judges = ((1, "GPT-4", "Vicuna"), (7, "people", "Vicuna"), (7, "GPT-4", "Vicuna"), (7, "GPT-4", "Open Assistant"))
    sums = [sum(int(row.elo) for row in elo if (row.table, row.judge, row.benchmark) == judge) for judge in judges]
    assert sums == [7999, 8002, 7996, 7000]


def test_games_are_those_of_the_files():
    games = published_games("vicuna")
    assert len(games) == 56 * 80 and games.questions == () and set(games.question) == {-1}
    assert np.bincount(games.verdicts).tolist() == [2512, 1355, 600, 13]  # counted from the files one by one
    assert np.bincount(published_games("oa").verdicts).tolist() == [18875, 14043, 5626, 1482]
    assert len(games.systems) == 8 and len(published_games("oa").systems) == 7  # the larger one has no Bard
    chosen = (games.first == games.systems.index("gpt-4")) & (games.second == games.systems.index("gpt-3.5"))
    counts = np.bincount(games.verdicts[chosen], minlength=len(VERDICTS))
    assert dict(zip(VERDICTS, counts.tolist(), strict=True)) == {"first": 69, "second": 3, "tie": 8, "unread": 0}


def test_other_games_are_refused():
    with pytest.raises(ValueError, match="benchmark is 'mt-bench'; counted are 'vicuna' and 'oa'"):
        published_games("mt-bench")


def test_a_pair_with_a_lost_game_is_named(tmp_path, monkeypatch):
    text = course_path("data", "published", "guanaco_vicuna_pairs.csv").read_text("utf-8")
    (tmp_path / "guanaco_vicuna_pairs.csv").write_text(text.replace("bard,gpt-4,6,67,7,0", "bard,gpt-4,6,66,7,0"))
    monkeypatch.setattr(module, "course_path", lambda *names: tmp_path / names[-1])
    with pytest.raises(ValueError, match="bard and gpt-4 have another number of games than 80"):
        published_games("vicuna")


def test_scores_are_in_the_order_of_reading():
    """In files of systems with a size, the answers' ids show that ChatGPT comes first where the name has it last."""
    found = {(row.name_1_in_file, row.name_2_in_file): row for row in relative_totals()}
    assert len(found) == 72
    assert list(found["65b-guanaco", "gpt-3.5"].scores().items()) == [("gpt-3.5", 687.0), ("65b-guanaco", 664.0)]
    assert list(found["gpt-3.5", "65b-guanaco"].scores().items()) == [("65b-guanaco", 681.0), ("gpt-3.5", 668.0)]
    assert list(found["bard", "gpt-3.5"].scores().items()) == [("bard", 662.0), ("gpt-3.5", 687.0)]


def test_sums_over_questions_are_half_the_totals_where_none_is_missing():
    """A question's score is the mean of its two orders, so two files make twice the sum."""
    totals, complete = {}, {}
    for row in relative_totals():
        for name, score in row.scores().items():
            other = ({row.name_1_in_file, row.name_2_in_file} - {"gpt-3.5"}).pop()
            totals[other, name] = totals.get((other, name), 0) + score
            complete[other] = complete.get(other, True) and row.rated == 80
    sums = published("guanaco_relative_questions.csv", RelativeQuestions)
    assert len(sums) == 36 and all(row.questions == 80 or row.system == "gpt-4" for row in sums)
    for row in (row for row in sums if complete[row.system]):
        assert 2 * row.total_system == totals[row.system, row.system]
        assert 2 * row.total_chatgpt == totals[row.system, "gpt-3.5"]
    assert sum(complete.values()) == 17


# ---------------------------------------------------------------------------------------------------- damaged files

HEAD = "first,second,first_wins,second_wins,ties,unparsed\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("first,second\na,b\n", "line 1: the columns are first,second; they must be first,second,first_wins"),
        (f"# source\n\n{HEAD}a,b,1,2,3\n", "line 4: 5 cells; there must be 6"),
        (f"{HEAD}a,b,1,2,3,4,5\n", "line 2: 7 cells"),
        (f"{HEAD}a,b,1,2,3,0\na,b,1,2,٣,0\n", "line 3: ties is '٣'; it must be a whole number of 0 or more"),
        (f"{HEAD}a,b,1,2,3,0\na,b,1,2,-3,0\n", "line 3: ties is '-3'; it must be a whole number of 0 or more"),
        (f"{HEAD}a,b,1,2,3.0,0\n", "line 2: ties is '3.0'"),
        (f"{HEAD}a,b,1,,3,0\n", "line 2: second_wins is ''"),
        (HEAD, "has no rows"),
        ("", "has no rows"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path, text, words):
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="pairs.csv") as error:
        read_rows(path, PairCount)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("Int4,int4,maybe,34.34,paper,", "double_quant is 'maybe'; it must be true or false"),
        ("Int4,int4,false,nan,paper,", "perplexity is 'nan'; it must be a number"),
        ("Int4,int4,false,34;34,paper,", "perplexity is '34;34'; it must be a number"),
        ("Int4,int4,false,,paper,", "perplexity is ''; it must be a number"),
    ],
)
def test_a_cell_of_another_kind_is_named(tmp_path, line, words):
    path = tmp_path / "perplexity.csv"
    path.write_text("data_type,codebook,double_quant,perplexity,source,erratum\n" + line)
    with pytest.raises(ValueError, match=f"perplexity.csv, line 2: {words}"):
        read_rows(path, Perplexity)


def test_a_file_that_is_missing_or_no_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.csv"):
        read_rows(tmp_path / "nothing.csv", Elo)
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="bytes.csv is not a text in UTF-8"):
        read_rows(tmp_path / "bytes.csv", Elo)


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=9)
NAME = TEXT.filter(lambda text: not text.startswith("#"))
COUNT = st.integers(0, 999)


@settings(max_examples=25)
@given(rows=st.lists(st.builds(PairCount, NAME, TEXT, COUNT, COUNT, COUNT, COUNT), min_size=1, max_size=4))
def test_what_is_written_is_read(tmp_path_factory, rows):
    path: Path = tmp_path_factory.mktemp("table") / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEAD.strip().split(","), *map(astuple, rows)])
    assert read_rows(path, PairCount) == tuple(rows)
