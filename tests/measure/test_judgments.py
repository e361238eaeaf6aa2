"""Reading games: the authors' folder with its traps, counts, one's own lines; what is bad is named by file and line."""

import json
import os

import pytest

from qlora_lab.files.course import course_path
from qlora_lab.measure.judgments import COUNTS, read_games

VICUNA = "{}-vicuna-generations-topp0.9-temp0.7"  # as the authors name the answers of a system that they trained
END = "-gpt-4-reviewer-threeclass.jsonl"


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def judgment(question: int, score: object) -> dict:
    return {"review_id": "x", "question_id": question, "metadata": {}, "text": "Both are good.\n\n1", "score": score}


def test_the_authors_folder(tmp_path):
    write(tmp_path / f"{VICUNA.format('30b-guanaco')}-vs-answer-gpt35{END}", judgment(1, 1), judgment(2, -1))
    write(tmp_path / f"answer-gpt4-vs-answer-vicuna-13b{END}", judgment(1, 3), judgment(2, 2))
    games = read_games(tmp_path)
    assert games.systems == ("33b-guanaco", "gpt-3.5", "gpt-4", "vicuna-13b")  # the paper's names
    assert games.questions == ("1", "2") and games.verdicts.tolist() == [0, 3, 2, 1] and games.unread == 1
    assert games.first.tolist() == [0, 0, 2, 2]


def test_the_folder_of_open_assistant_names_questions_by_message(tmp_path):
    row = {"message_id": "ab-cd", "score": 2}
    write(tmp_path / f"7b-guanaco-oa-generations-topp0.9-temp0.7-vs-gpt-3.5-oa-generations{END}", row)
    games = read_games(tmp_path)
    assert games.systems == ("7b-guanaco", "gpt-3.5") and games.questions == ("ab-cd",)


@pytest.mark.parametrize(("name", "pairs", "games", "unread"), [("vicuna", 56, 4480, 13), ("oa", 42, 40026, 1482)])
def test_the_counted_judgments(name, pairs, games, unread):
    found = read_games(course_path("data", "published", f"guanaco_{name}_pairs.csv"))
    assert (len(found), found.unread, found.questions) == (games, unread, ())
    assert len(set(zip(found.first.tolist(), found.second.tolist(), strict=True))) == pairs


def test_one_s_own_lines_may_hold_more(tmp_path):
    row = {"question": "q1", "first": "nf4", "second": "bf16", "verdict": "tie", "judge": "rouge", "seconds": 0.1}
    games = read_games(write(tmp_path / "games.jsonl", row, row | {"question": 7, "verdict": "unread"}))
    assert games.questions == ("q1", "7") and games.verdicts.tolist() == [2, 3]


GOOD = {"question": "q", "first": "a", "second": "b", "verdict": "tie"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"verdict": "both"}, "line 2: the verdict is 'both'; allowed are first, second, tie, unread"),
        ({"first": 3}, "line 2 has first=3: it must be a text"),
        ({"second": "a"}, "line 2: 'a' against 'a': a game needs two systems"),
        ({"question": None}, "line 2 has no question that is a text or a whole number"),
    ],
)
def test_a_bad_line_of_one_s_own(tmp_path, row, words):
    path = write(tmp_path / "games.jsonl", GOOD, GOOD | row)
    with pytest.raises(ValueError, match=f"games.jsonl, {words}"):
        read_games(path)


def test_lines_that_are_no_games(tmp_path):
    path = write(tmp_path / "games.jsonl", GOOD, {"question": "q"})
    with pytest.raises(ValueError, match="line 2 has no 'first'"):
        read_games(path)
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        read_games(write(path, GOOD, [1]))
    path.write_text('{"question": ', encoding="utf-8")
    with pytest.raises(ValueError, match="games.jsonl, line 1"):
        read_games(path)
    path.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="games.jsonl holds no game"):
        read_games(path)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (judgment(2, 4), r"line 2: the score is 4; allowed are 1, 2, 3 \(a tie\) and -1"),
        (judgment(2, True), "line 2: the score is True"),
        (judgment(2, [8.0, 9.0]), "line 2 holds two scores, no verdict"),
        ({"score": 1}, "line 2 has no question_id or message_id"),
        ("text", "line 2 has no question_id or message_id"),
    ],
)
def test_a_bad_line_of_the_authors(tmp_path, row, words):
    write(tmp_path / f"a-vs-b{END}", judgment(1, 1), row)
    with pytest.raises(ValueError, match=f"{END}, {words}"):
        read_games(tmp_path)


def test_a_game_that_is_there_twice(tmp_path):
    """Once more in the same file, and in a file whose other name means the same systems."""
    path = write(tmp_path / "games.jsonl", GOOD, GOOD | {"first": "b", "second": "a"}, GOOD | {"verdict": "first"})
    said = r"line 3 holds the game of 'a' against 'b' on question 'q' again, which is in .*games.jsonl, line 1: keep"
    with pytest.raises(ValueError, match=said):
        read_games(path)
    path.unlink()
    write(tmp_path / f"answer-gpt4-vs-bard{END}", judgment(1, 1), judgment(2, 1))
    write(tmp_path / f"gpt-4-vs-bard{END}", judgment(3, 1), judgment(2, 1))
    with pytest.raises(ValueError, match=rf"gpt-4-vs-bard{END}, line 2 .*'gpt-4' against 'bard' on question '2' again"):
        read_games(tmp_path)


def test_folders_that_are_no_tournament(tmp_path):
    with pytest.raises(ValueError, match="holds no .jsonl file"):
        read_games(tmp_path)
    with pytest.raises(FileNotFoundError, match="no games at .*nowhere"):
        read_games(tmp_path / "nowhere")
    write(tmp_path / "answers.jsonl", judgment(1, 1))
    with pytest.raises(ValueError, match="answers.jsonl is not named FIRST-vs-SECOND"):
        read_games(tmp_path)
    (tmp_path / "answers.jsonl").rename(tmp_path / f"answer-gpt4-vs-gpt-4{END}")  # two names of one system
    with pytest.raises(ValueError, match="'gpt-4' against 'gpt-4'"):
        read_games(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("first,second,ties\na,b,1\n", "line 1 lacks first_wins, second_wins, unparsed"),
        ("first,second,{0}\na,b,1,2,3,4\na,b,1,2,3\n", "line 3 has another number of cells than the 6 columns"),
        ("first,second,{0}\na,b,1,2,3,4,5\n", "line 2 has another number of cells than the 6 columns"),
        ("first,second,{0}\na,b,1,2,3,\n", "line 2 has the counts 1, 2, 3, : they are whole numbers"),
        ("first,second,{0},ties\na,b,1,2,3,4,5\n", "line 1 has the column ties twice"),
        ("first,second,{0}\na, b,1,2,3,4\n", "line 2: the name ' b' begins or ends with a space: remove it"),
        ("first,second,{0}\na,b,999999,0,0,0\nb,a,0,0,1,1\n", "line 3 brings the games to 1,000,001, but at most"),
        ("# source: x\nfirst,second,ties\na,b,1\n", "line 2 lacks first_wins, second_wins, unparsed"),
        ("first,second,{0}\na,b,1,-2,3,4\n", "line 2 has the counts 1, -2, 3, 4"),
        ("first,second,{0}\na,b,1,2,3,99999999\n", "line 2 has the counts 1, 2, 3, 99999999: .* 1,000,000 at most"),
        ("first,second,{0}\na,a,1,2,3,4\n", "line 2: 'a' against 'a'"),
        ("first,second,{0}\n", "holds no game"),
        ("", "line 1 lacks first, second, first_wins"),
    ],
)
def test_bad_counts(tmp_path, text, words):
    path = tmp_path / "pairs.csv"
    path.write_text(text.format(",".join(COUNTS)), encoding="utf-8")
    with pytest.raises(ValueError, match=f"pairs.csv,? ?{words}"):
        read_games(path)


def test_a_million_games_are_read(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text(f"first,second,{','.join(COUNTS)}\na,b,999999,0,0,0\nb,a,0,0,1,0\n")
    assert len(read_games(path)) == 1_000_000


@pytest.mark.parametrize("name", ["pairs.csv", "games.jsonl", f"a-vs-b{END}"])
def test_what_is_no_file_is_not_opened(tmp_path, name):
    """A FIFO without a writer: opening it would wait for ever. And a device without an end."""
    path = tmp_path / name
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(path)
        for given in (path, tmp_path) if name.endswith(END) else (path,):
            with pytest.raises(ValueError, match=f"{name} is a FIFO, a socket or a device, but must be a regular"):
                read_games(given, progress=False)
        path.unlink()


def test_a_folder_among_the_judgments(tmp_path):
    (tmp_path / f"a-vs-b{END}").mkdir()
    with pytest.raises(ValueError, match=f"a-vs-b{END} is a folder, but must be a regular file"):
        read_games(tmp_path)


def test_counts_in_another_encoding(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_bytes("first,second,größe".encode("latin-1"))
    with pytest.raises(ValueError, match="pairs.csv is not a CSV file in UTF-8"):
        read_games(path)


def test_comments_count_as_lines(tmp_path):
    path = tmp_path / "counts.csv"
    path.write_text("# source\nfirst,second,first_wins,second_wins,ties,unparsed\n# more\na,b,1,0,0,x\n")
    with pytest.raises(ValueError, match="counts.csv, line 4 has the counts 1, 0, 0, x"):
        read_games(path)
