"""Rate a tournament by Elo in thousands of random orders, and by Bradley-Terry: seconds, and how they grow.

    python bench/tournament.py                     measure, write tournament.json and the table in README.md; 1 minute
    python bench/tournament.py --quick --out FILE  few orders: to see that it runs
    python bench/tournament.py --render            renew the table from tournament.json

The games are the 4,480 counted judgments of data/published/guanaco_vicuna_pairs.csv, or some of them, or copies. The
readable loop plays one order, and so does elote, if it is installed (pip install elote): with the same ratings, to 1e-6
points. Figures are medians of several rounds in turn. Nothing here asserts a time.
"""

import argparse
import datetime
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench.files import between, write  # noqa: E402
from bench.timing import cpu_name, in_turn, peak_bytes  # noqa: E402
from qlora_lab.files.course import course_path  # noqa: E402
from qlora_lab.measure.bradley_terry import bradley_terry  # noqa: E402
from qlora_lab.measure.games import Games  # noqa: E402
from qlora_lab.measure.judgments import read_games  # noqa: E402
from qlora_lab.measure.tournament import Rules, elo, elo_of_one_order, scores  # noqa: E402

OUT, PAGE = HERE / "tournament.json", HERE / "README.md"
BEGIN, END = "<!-- tournament: begin -->", "<!-- tournament: end -->"
ORDERS, GAMES = 10_000, 4_480  # as in the QLoRA paper
BY_ORDERS = (1_000, 3_000, 10_000, 30_000)
BY_GAMES = (1_120, 4_480, 17_920)


def games_of(count: int) -> Games:
    """`count` games: a random part of the judgments, or copies of all of them."""
    games = read_games(course_path("data", "published", "guanaco_vicuna_pairs.csv"))
    chosen = np.random.default_rng(0).permutation(np.resize(np.arange(len(games)), max(count, len(games))))[:count]
    return games.where(chosen)


def by_elote(games: Games, order: np.ndarray) -> dict[str, float]:
    """One order with elote's competitors, K = 32, start 1000."""
    from elote import EloCompetitor

    EloCompetitor.configure_class(k_factor=32)
    players = [EloCompetitor(initial_rating=1000) for _ in games.systems]
    for game in order:
        first, second = players[games.first[game]], players[games.second[game]]
        verdict = games.verdicts[game]
        if verdict == 0:
            first.beat(second)
        elif verdict == 1:
            second.beat(first)
        else:
            first.tied(second)
    return {name: player.rating for name, player in zip(games.systems, players, strict=True)}


def measured(quick: bool) -> dict:
    shrink, rounds = (50, 2) if quick else (1, 5)
    rules, games = Rules(unread="tie"), games_of(GAMES)
    by_orders = {
        f"{orders} orders": lambda orders=orders: elo(games, rules, orders // shrink, progress=False)
        for orders in BY_ORDERS
    }
    sized = {count: games_of(count) for count in BY_GAMES}
    by_games = {
        f"{count} games": lambda some=some: elo(some, rules, 1_000 // shrink, progress=False)
        for count, some in sized.items()
    }
    played = scores(games, rules)
    order = np.random.default_rng(0).permutation(len(games))
    one = {"readable loop": lambda: elo_of_one_order(played, order, len(games.systems), rules)}
    if find_spec("elote"):
        ours, theirs = one["readable loop"](), list(by_elote(games, order).values())
        assert np.abs(np.subtract(ours, theirs)).max() < 1e-6, "elote plays by other rules: compare nothing"
        one["elote"] = lambda: by_elote(games, order)
    fits = {"Bradley-Terry, 1,000 resamples": lambda: bradley_terry(games, resamples=1_000 // shrink)}
    return {
        "orders": in_turn(by_orders, rounds, 0),
        "games": in_turn(by_games, rounds, 0),
        "one order": in_turn(one, rounds, 0),
        "fit": in_turn(fits, rounds, 0),
        "bytes": peak_bytes(lambda: elo(games, rules, ORDERS // shrink, progress=False)),
        "quick": quick,
    }


def table(result: dict) -> str:
    """The README's table, with the machine."""
    rows = ["| what | median | quartiles | an order of 4,480 games |", "|---|---|---|---|"]
    for part in ("orders", "games", "one order", "fit"):
        for name, time in result[part].items():
            orders = {"orders": name.split()[0], "games": "1000", "one order": "1"}.get(part)
            games = int(name.split()[0]) if part == "games" else GAMES
            each = "" if orders is None else f"{time['median'] / int(orders) * GAMES / games * 1e3:.3g} ms"
            label = f"Elo, 1000 orders, {name}" if part == "games" else f"Elo, {name}" if part != "fit" else name
            rows.append(f"| {label} | {time['median']:.3g} s | {time['low']:.3g} to {time['high']:.3g} s | {each} |")
    memory = "" if result["bytes"] is None else f" {ORDERS} orders take {result['bytes'] / 2**20:.0f} MiB."
    about = f"{result['processor']}, {result['date']}; {result['load']:.1f} other processes wanted it at the start."
    return "\n".join(rows) + f"\n\nMeasured on {about}{memory}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few orders, to see that it runs")
    parser.add_argument("--out", type=Path, default=OUT, help="where the figures go")
    parser.add_argument("--render", action="store_true", help="renew the table from the stored figures")
    a = parser.parse_args()
    if not a.render:
        about = {"processor": cpu_name(), "date": datetime.date.today().isoformat(), "load": os.getloadavg()[0]}
        write(a.out, json.dumps(about | measured(a.quick), indent=1) + "\n")
    if a.out == OUT:
        page = PAGE.read_text("utf-8")
        result = json.loads(OUT.read_text("utf-8"))
        write(PAGE, between(page, BEGIN, END, table(result), "bench/README.md"))


if __name__ == "__main__":
    main()
