"""Let data types and adapters of a model answer held-out questions, and rate them by a judge; or rate games."""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import qlora_lab as ql
from qlora_lab.cli.loading import print_note
from qlora_lab.cli.options import add_fields, common, one_line, whole
from qlora_lab.cli.printing import table
from qlora_lab.train.run_options import ModelOptions

if TYPE_CHECKING:
    from qlora_lab.measure.answers import System
    from qlora_lab.measure.judges import Judge, Question
    from qlora_lab.measure.standings import Estimate, Standing, Standings

EXAMPLE = "qlora-lab tournament smollm2-135m --codebooks none nf4 int4 --adapters runs/first/adapter --out runs/games"
LESS_MEMORY = "use fewer --max-new-tokens, or a smaller --judge-model; the answers in --out are kept"
LESS_GAMES = "close other programs, or rate fewer games"  # of --games, which loads no model
JUDGES = ("rouge", "logprob", "logprob-sum", "always-first")
ANSWERS, GAMES, PAGE = "answers.jsonl", "games.jsonl", "results.html"  # in --out
NAMED = ("question", "first", "second", "reason")  # fields of a row that say why its verdict is unread
RATING = ("model", "games", "out", "json", "quiet")  # options that are checked apart, or that --games allows
FEW = 0.03  # share of resamples without an answer, up to which leaving them out hardly moves an end


def add_options(parser: argparse.ArgumentParser) -> None:
    what = f"{ModelOptions.__dataclass_fields__['model'].metadata['help']}; leave it out with --games"
    parser.add_argument("model", nargs="?", help=what)
    given = "rate existing games instead of playing: an earlier --out, a folder of the QLoRA authors' judgments, a CSV "
    given += "file of counts, or a JSONL file of your own"
    parser.add_argument("--games", metavar="PATH", help=given)
    systems = parser.add_argument_group("systems")
    kinds = "data types to compare, such as nf4, fp4 or int4; none leaves the weights as they are"
    systems.add_argument("--codebooks", nargs="+", default=["none", "nf4", "int4"], metavar="NAME", help=kinds)
    add_fields(systems, ModelOptions, "block_size", "double_quant")
    each = "adapters in PEFT's format; each plays on every data type, and the model without an adapter plays too"
    systems.add_argument("--adapters", nargs="+", default=[], metavar="FOLDER", help=each)
    games = parser.add_argument_group("games")
    games.add_argument(
        "--questions", type=whole, default=20, metavar="N", help="how many held-out docstrings to ask for"
    )
    most = "maximum number of tokens in an answer"
    games.add_argument("--max-new-tokens", type=whole, default=40, metavar="N", help=most)
    kinds = "rouge: higher ROUGE-L to the summary that a person wrote; logprob: higher log-probability per token under "
    kinds += "--judge-model; logprob-sum: the same for the whole answer; always-first: broken on purpose, to see that "
    kinds += "the command notices"
    games.add_argument("--judge", choices=JUDGES, default="rouge", help=kinds)
    games.add_argument(
        "--judge-model",
        metavar="MODEL",
        help="the model that judges, for logprob and logprob-sum (default: MODEL, not quantised)",
    )
    output = parser.add_argument_group("output")
    kept = "folder for answers, games and a page of results; a stopped tournament in it is continued"
    output.add_argument("--out", metavar="FOLDER", help=kept)
    common(output)


def run(a: argparse.Namespace) -> None:
    _check_words(a)
    if a.model is None:
        a.less_memory = LESS_GAMES
        found = _existing(a)
        _report(a, found, _sentences(found, []))
        return
    from qlora_lab.files.lock import locked_folder
    from qlora_lab.measure.answers import check_systems, systems
    from qlora_lab.model.fetch import resolve
    from qlora_lab.quant.numbers import check_whole
    from qlora_lab.train.run_folder import find_adapter

    check_whole("questions", a.questions)
    check_whole("max-new-tokens", a.max_new_tokens)
    for adapter in a.adapters:  # a missing one should not cost the minutes that the others take
        find_adapter(Path(adapter))
    codebooks = [None if name == "none" else name for name in a.codebooks]
    players = systems(codebooks, a.adapters, a.block_size, a.double_quant)
    check_systems(players)
    if a.judge_model is not None:  # it is needed last, and a mistyped name is told first
        resolve(a.judge_model, progress=not a.quiet)
    out = _checked_folder(a)
    with locked_folder(out, "tournament"):  # two commands must not ask for the same answers
        found, said, rows = _played(a, players, out)
    unread = [{name: row[name] for name in NAMED} for row in rows if row["verdict"] == "unread"]
    _report(a, found, said, page=str(out / PAGE), games=str(out / GAMES), unread=unread)


def _played(a: argparse.Namespace, players: list["System"], out: Path) -> tuple["Standings", list[str], list[dict]]:
    """Answer, judge, rate and write the page. Returns standings, sentences and rows."""
    from qlora_lab.measure.answers import answer_all, check_unchanged
    from qlora_lab.measure.play import check_tournament, games_of, play

    questions = _questions(a)
    judge = None if a.judge.startswith("logprob") else _judge(a)
    # What is known is compared before minutes are spent. A judge that is a model gets its name once it is loaded.
    check_tournament(out / GAMES, judge and judge.name, [player.name for player in players], questions)
    options = {"max_new_tokens": a.max_new_tokens, "progress": not a.quiet}
    if (out / GAMES).exists():  # a changed answer would be refused in the end, minutes later
        check_unchanged(a.model, players, out / ANSWERS, **options)
    answers = answer_all(a.model, players, questions, out / ANSWERS, **options)
    judge = judge or _judge(a)  # only now, so that one model is in memory at a time
    rows = play(questions, answers, judge, out / GAMES, progress=not a.quiet)
    _check_read(rows)
    found = _standings(a, games_of(rows))
    said = [f"Judge: {judge.name}.", *_sentences(found, rows)]
    _write_page(out / PAGE, found, said, questions, answers, rows)
    return found, said, rows


def _check_words(a: argparse.Namespace) -> None:
    if (a.model is None) == (a.games is None):
        raise ValueError("give either a model, whose data types play, or --games, to rate existing games")
    if a.games is not None and (changed := _changed(a)):
        words = "is given with --games, which only rates: leave it out" if len(changed) == 1 else ""
        words = words or "are given with --games, which only rates: leave them out"
        raise ValueError(f"{', '.join(changed)} {words}")
    if a.model is not None and a.out is None:
        raise ValueError("--out is missing: name a folder for answers, games and the page of results")
    if a.judge_model is not None and not a.judge.startswith("logprob"):
        raise ValueError(f"--judge-model is given, but --judge {a.judge} asks no model: add --judge logprob")


def _changed(a: argparse.Namespace) -> list[str]:
    """Name the options that would be ignored by --games."""
    parser = argparse.ArgumentParser()  # never reads the command line; it only has the defaults
    add_options(parser)
    # Against a second parser's defaults, so that an option that is added later is refused as well.
    defaults = vars(parser.parse_args([]))
    changed = [name for name, value in defaults.items() if name not in RATING and getattr(a, name) != value]
    flags = [f"--{'no-' * (defaults[name] is True)}{name.replace('_', '-')}" for name in changed]
    return flags + ["--out"] * (a.out is not None)


def _existing(a: argparse.Namespace) -> "Standings":
    from qlora_lab.files.out_path import out_path
    from qlora_lab.measure.judgments import read_games

    path = out_path(a.games)  # "" would be the current folder
    if (path / GAMES).is_file():  # an earlier --out
        path = path / GAMES
    return _standings(a, read_games(path, progress=not a.quiet))


def _standings(a: argparse.Namespace, games) -> "Standings":
    from qlora_lab.measure.standings import standings

    return standings(games, progress=not a.quiet)


def _checked_folder(a: argparse.Namespace) -> Path:
    """Return --out, if it is new, empty or a tournament's."""
    from qlora_lab.files.lock import LOCK, SCRATCH
    from qlora_lab.files.out_path import check_apart, out_path
    from qlora_lab.show.tournament_page import START

    out = out_path(a.out)
    check_apart(out, a.model, *a.adapters, *filter(None, [a.judge_model]))
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file, but a tournament needs a folder: name another")
    names = [path.name for path in out.iterdir()] if out.exists() else []
    others = [name for name in names if not (name.endswith(LOCK) or SCRATCH.fullmatch(name))]  # left by a kill
    if others and not {ANSWERS, GAMES} & {*others}:
        raise FileExistsError(f"{out} holds {min(others)!r} and no tournament: name a new or empty folder")
    page = out / PAGE
    if page.exists() and not (page.is_file() and page.read_bytes().startswith(START.encode())):
        raise FileExistsError(f"{page} was not written by a tournament, so it is kept: name another folder")
    return out


def _questions(a: argparse.Namespace) -> list["Question"]:
    from qlora_lab.measure.judges import questions_of

    examples = ql.load_data("docstrings", "test", progress=not a.quiet)
    if len(examples) < a.questions:
        raise ValueError(
            f"--questions is {a.questions}, but there are {len(examples):,} held-out docstrings: take fewer"
        )
    return questions_of(examples[: a.questions])  # the first are a fair sample: they are sorted by a hash


def _judge(a: argparse.Namespace) -> "Judge":
    from qlora_lab.measure.judges import LogProbabilityJudge, ReferenceJudge, always_first

    if a.judge == "rouge":
        return ReferenceJudge()
    if a.judge == "always-first":
        return always_first
    import torch

    model, tokenizer = ql.load(a.judge_model or a.model, None, dtype=torch.float32, progress=not a.quiet)
    return LogProbabilityJudge(model, tokenizer, per_token=a.judge == "logprob")


def _check_read(rows: list[dict]) -> None:
    reasons = [row["reason"] for row in rows if row["verdict"] == "unread"]
    if len(reasons) == len(rows):
        raise ValueError(f"no verdict of {len(rows)} could be read, so nothing can be rated; the first: {reasons[0]}")


# ------------------------------------------------------------------------------------------------- what is printed


def _report(a: argparse.Namespace, found: "Standings", said: list[str], **more) -> None:
    """Print the table and the sentences, or all of it as JSON with what else a caller knows."""
    if a.json:
        print(json.dumps(_record(found) | more))
        return
    print(table([_cells(row) for row in found.rows]))
    print("", *map(one_line, said), sep="\n")
    if "page" in more:
        print_note(a, f"the answers side by side are in {more['page']}")


def _sentences(found: "Standings", rows: list[dict]) -> list[str]:
    """Say what to know before believing the table."""
    said = [f"{str(found.judge)[0].upper()}{str(found.judge)[1:]}."]
    if found.position:
        said.append(f"Being read first is worth {_interval(found.position)} points.")
    if found.no_rating:
        said.append(f"Bradley-Terry gives no rating: {found.no_rating}.")
    elif found.over == "games":
        said.append("Intervals and ranks come from resampled games, since their questions are not in the file.")
        # on the judgments of the QLoRA authors, whose files have the questions, by a factor of two (LOG.md)
        said.append("Games of one question are not independent, so both are too narrow.")
    if (found.without_answer or 0) > FEW:
        words = f"{found.without_answer:.0%} of the resampled tournaments rate nobody and were left out"
        said.append(f"{words}, so intervals and ranks are too narrow: ask more questions.")
    if unread := found.judge.verdicts.unread:
        one = "1 verdict could not be read and was left out"
        # counted here too: a table with a column of zeros is read less closely than a sentence
        words = one if unread == 1 else f"{unread} verdicts could not be read and were left out"
        for row in [row for row in rows if row["verdict"] == "unread"][:1]:  # none, of games that others played
            words += f"; the first: question {row['question']}, {row['first']!r} against {row['second']!r}"
            words += f" ({row['reason']})"
        said.append(f"{words}.")
    return said


def _cells(row: "Standing") -> dict[str, str]:
    return {
        "system": one_line(row.system),  # of a foreign file, perhaps
        "Elo": f"{row.elo:.0f} ± {row.one_order:.0f}",  # one order's standard deviation
        "Bradley-Terry (95 %)": _interval(row.rating),
        "rank": "" if row.ranks is None else "-".join(map(str, dict.fromkeys(row.ranks))),
        "games": str(row.games),
        "unread": str(row.unread),
    }


def _interval(estimate: "Estimate | None") -> str:
    if estimate is None:
        return ""
    if math.isinf(estimate.value):
        return "won all" if estimate.value > 0 else "lost all"
    # rounded as numbers: in an f-string a small negative number would be "-0"
    low, high = ("" if math.isinf(end) else str(round(end)) for end in (estimate.low, estimate.high))
    # an open end: some resamples have a system that won or lost all of its games
    ends = f"{low} to {high}" if low and high else f"{low} and more" if low else f"{high} and less" if high else "any"
    return f"{round(estimate.value)} ({ends})"


def _record(found: "Standings") -> dict:
    """Return the standings for JSON, which has no infinity: it is null there, and `says` has it in words."""

    def finite(value):
        if isinstance(value, dict):
            return {name: finite(inner) for name, inner in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    judge = found.judge
    return {
        "systems": [finite(asdict(row)) | {"says": _interval(row.rating)} for row in found.rows],
        "judge": finite(asdict(judge))
        | {"p": judge.p, "p_winners": judge.p_winners, "is_broken": judge.is_broken}
        | {"says": str(judge)},
        "position": found.position and finite(asdict(found.position)),
        "intervals_over": found.over,
        "without_answer": found.without_answer,
        "no_rating": found.no_rating,
    }


def _write_page(path: Path, found, said: list[str], questions, answers, rows: list[dict]) -> None:
    from qlora_lab.files.replace import replace_text
    from qlora_lab.show.tournament_page import tournament_page

    replace_text(path, tournament_page([_cells(row) for row in found.rows], said, questions, answers, rows))
