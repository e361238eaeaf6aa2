"""Which rules turn the QLoRA authors' judgments into the ratings that they printed? Try what the paper leaves open.

    python bench/elo_rules.py qlora/eval/ratings-gpt4/vicuna/pairwise    write elo_rules.json; half a minute

The folder comes with `git clone https://github.com/artidoro/qlora`. Some rules need the question of each verdict, which
the counts in data/published do not hold. Figures alone are written, no text of the judge.
"""

import argparse
import datetime
import json
import sys
from itertools import product
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench.files import write  # noqa: E402
from qlora_lab.measure.bradley_terry import Estimate, bradley_terry  # noqa: E402
from qlora_lab.measure.diagnosis import diagnose_judge  # noqa: E402
from qlora_lab.measure.games import Games  # noqa: E402
from qlora_lab.measure.judgments import read_games  # noqa: E402
from qlora_lab.measure.published import Elo, published  # noqa: E402
from qlora_lab.measure.tournament import AS_UNREAD, BOTH_ORDERS, Rules, elo  # noqa: E402

SOURCE = "github.com/artidoro/qlora, commit 7f4e95a, eval/ratings-gpt4/vicuna/pairwise (MIT)"
# Its names of the systems -> those of the authors' files. The ratings themselves are read from data/published.
NAMES = {"GPT-4": "gpt-4", "ChatGPT": "gpt-3.5", "Vicuna 13B": "vicuna-13b", "Bard": "bard"}
NAMES |= {f"Guanaco {size}B": f"{size}b-guanaco" for size in (7, 13, 33, 65)}


def table_1() -> dict[str, float]:
    """The printed ratings, in points, by the names of the authors' files."""
    return {NAMES[row.system]: float(row.elo) for row in published("elo.csv", Elo) if row.table == 1}


def rounded(ratings: dict[str, float]) -> dict[str, float]:
    return {name: round(rating, 1) for name, rating in ratings.items()}


def fitted(games: Games) -> dict:
    """Bradley-Terry's points with intervals, and ranks."""

    def three(one: Estimate) -> list[float]:
        return [round(value, 3) for value in (one.value, one.low, one.high)]

    found = bradley_terry(games)
    return {
        "over": found.over,
        "ratings": {name: three(one) for name, one in found.ratings.items()},
        "ranks": found.ranks,
        "position": three(found.position),
        "ties": three(found.ties),
    }


def replayed(games: Games, printed: dict[str, float], rules: Rules, orders: int) -> dict:
    """Ratings under one set of rules, and how far they are from the printed ones: at most, and root mean square."""
    ratings = elo(games, rules, orders, progress=False).ratings
    differences = np.array([ratings[name] - printed[name] for name in games.systems])
    farthest, typical = np.abs(differences).max(), np.sqrt((differences**2).mean())
    said = {"k": rules.k, "unread": rules.unread, "both_orders": rules.both_orders, "ratings": rounded(ratings)}
    return said | {"farthest": round(float(farthest), 1), "typical": round(float(typical), 1)}


def measured(games: Games, orders: int) -> dict:
    printed = table_1()
    rules = [Rules(k=k, unread=u, both_orders=b) for k, u, b in product((16.0, 32.0), AS_UNREAD, BOTH_ORDERS)]
    rows = [replayed(games, printed, one, orders) for one in tqdm(rules, "rules")]
    judge = diagnose_judge(games)
    # By name: "first" has those games in which the name that sorts first was read first. Each half is a tournament.
    halves = {"first": games.where(games.first < games.second), "second": games.where(games.first > games.second)}
    # The same games without their questions: what an interval over games would claim.
    apart = Games(games.systems, (), np.full(len(games), -1), games.first, games.second, games.verdicts)
    return {
        "source": SOURCE,
        "published": printed,
        "orders": orders,
        "rules": rows,
        "deviation of one order": rounded(elo(games, orders=orders).deviations),
        "one order of each pair": {name: rounded(elo(half, orders=orders).ratings) for name, half in halves.items()},
        "answers read in both orders": judge.pairs,
        "with one verdict": judge.agreed,
        "bradley_terry": [fitted(games), fitted(apart)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the judgments")
    parser.add_argument("--orders", type=int, default=10_000, help="random orders of the games for each set of rules")
    parser.add_argument("--out", type=Path, default=HERE / "elo_rules.json", help="where the figures go")
    a = parser.parse_args()
    games = read_games(a.folder)
    if set(games.systems) != set(table_1()):
        parser.error(f"{a.folder} holds other systems than table 1: name the folder vicuna/pairwise")
    about = {"date": datetime.date.today().isoformat()}
    write(a.out, json.dumps(about | measured(games, a.orders), indent=1) + "\n")


if __name__ == "__main__":
    main()
