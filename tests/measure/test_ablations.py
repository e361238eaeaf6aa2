"""Ablations: intervals and verdicts worked out by hand, and rows that do not belong together."""

import json

import pytest

from qlora_lab.files.results_file import append_result, identity, open_results, verify_rows, with_checksum
from qlora_lab.measure.ablations import (
    ABLATIONS,
    NOISE,
    NOT_SEEN,
    SEEN,
    Interval,
    by_setting,
    interval,
    p_value,
    paired,
    read_ablations,
    size_is_open,
    summary,
    surviving,
    verdict,
)


def row(setting: str, seed: int, loss: float, **more) -> dict:
    made = {"model": {"name": "tiny", "weights_sha256": "w", "config_sha256": "c"}, "setting": setting, "seed": seed}
    made |= {"config": {"lr": 1.0}, "data": {"tokens_sha256": f"of seed {seed}"}, "versions": {}}
    made |= {"loss_before": 4.0, "loss_after": loss, "rouge_l_before": None, "rouge_l_after": None}
    return made | {"losses": [loss], "trainable": 1, "memory": None, "seconds": 0.1} | more


# Losses of three seeds. The batches of seed 2 are harder, for both settings.
ROWS = [row("lora", seed, loss) for seed, loss in ((0, 3.0), (1, 3.1), (2, 3.5))]
ROWS += [row("dora", seed, loss) for seed, loss in ((0, 2.9), (1, 3.0), (2, 3.4))]


def test_the_interval_is_student_s():
    found = interval([1.0, 2.0, 3.0])  # s = 1; tables have t = 4.303 for 2 degrees of freedom and 95 %
    assert found.mean == 2 and found.n == 3
    assert found.high == pytest.approx(2 + 4.303 / 3**0.5, abs=1e-3)  # the table's last digit
    assert found.low == pytest.approx(2 - 4.303 / 3**0.5, abs=1e-3)
    assert interval([5.0, 7.0]).high == pytest.approx(6 + 12.706, abs=1e-3)  # s / sqrt(2) = 1, t = 12.706


def test_one_seed_proves_nothing():
    alone = interval([5.0])
    assert alone == Interval(5.0, -float("inf"), float("inf"), 1)
    assert verdict(alone, "higher") == verdict(alone, "same", 1.0) == NOISE


def test_pairs_remove_what_the_batches_do():
    assert summary(ROWS, "lora").low < summary(ROWS, "dora").mean  # alone, the two overlap
    difference = paired(ROWS, "dora", "lora")  # -0.1 in each seed, so the interval is a point
    assert difference.mean == pytest.approx(-0.1) and difference.high == pytest.approx(-0.1)
    assert paired(ROWS, "lora", "dora").mean == pytest.approx(0.1)


def test_pairs_are_taken_over_common_seeds_whatever_their_order():
    rows = [row("other", 7, 0.0), row("other", 2, 4.5), row("other", 0, 3.0), *ROWS]
    found = paired(rows, "other", "lora")  # 0.0 in seed 0 and 1.0 in seed 2
    assert found.mean == pytest.approx(0.5) and found.n == 2


def test_the_later_row_of_a_seed_counts():
    rows = [*ROWS, row("lora", 0, 2.0)]
    assert [r["loss_after"] for r in by_setting(rows)["lora"]] == [2.0, 3.1, 3.5]
    assert list(by_setting(rows)) == ["lora", "dora"]


@pytest.mark.parametrize(
    ("low", "high", "lower", "higher", "same", "is_open"),
    [
        (-0.05, 0.05, NOT_SEEN, NOT_SEEN, SEEN, False),
        (0.003, 0.044, NOT_SEEN, NOT_SEEN, SEEN, False),  # beside zero, but too small to matter
        (0.06, 0.09, NOT_SEEN, SEEN, NOT_SEEN, False),
        (-0.09, -0.06, SEEN, NOT_SEEN, NOT_SEEN, False),
        (0.012, 0.145, NOT_SEEN, SEEN, NOT_SEEN, True),
        (-0.145, -0.012, SEEN, NOT_SEEN, NOT_SEEN, True),
        (-0.06, 0.05, NOISE, NOISE, NOISE, False),
        (0.0, 0.3, NOISE, NOISE, NOISE, False),
    ],
)
def test_one_rule_for_every_claim(low, high, lower, higher, same, is_open):
    difference = Interval((low + high) / 2, low, high, 3)
    assert [verdict(difference, claim) for claim in ("lower", "higher", "same")] == [lower, higher, same]
    assert size_is_open(difference) == is_open


def test_a_wider_margin_makes_two_the_same():
    difference = Interval(0.2, 0.1, 0.3, 3)
    assert verdict(difference, "same", 0.3) == verdict(difference, "higher", 0.05) == SEEN


def test_p_is_student_s():
    difference = interval([1.0, 2.0, 3.0])  # t = 2 / (1 / sqrt(3)) = 3.464 on 2 degrees of freedom
    exact = 1 - 2 * 3**0.5 / (12 + 2) ** 0.5  # with 2 of them, p = 1 - t / sqrt(t**2 + 2)
    assert p_value(difference) == pytest.approx(exact, rel=1e-9)  # float64
    t = 4.302653 * 0.05 / 0.03  # from a mean of 0 to the margin
    expected = 1 - t / (t**2 + 2) ** 0.5
    assert p_value(Interval(0.0, -0.03, 0.03, 3)) == pytest.approx(expected, rel=1e-5)  # the digits of 4.302653
    assert p_value(interval([5.0])) == 1 and p_value(interval([1.0, 1.0])) == 0


def test_holm_stops_at_the_first_that_fails():
    near = Interval(1.0, 0.1, 1.9, 3)  # p is below 0.05, but not below 0.05 / 2
    far = Interval(1.0, 0.99, 1.01, 3)
    assert surviving([near]) == [True]
    assert surviving([near, far]) == [True, True]  # the second is judged alone: 0.05 / 1
    assert surviving([near, near]) == [False, False]
    assert surviving([near, far, interval([5.0])]) == [False, True, False]


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(ValueError, match="no row of 'ia3' has 'loss_after': the settings are lora, dora"):
        summary(ROWS, "ia3")
    with pytest.raises(ValueError, match="no row of 'lora' has 'rouge_l_after'"):
        summary(ROWS, "lora", "rouge_l_after")
    with pytest.raises(ValueError, match="have no seed in common"):
        paired([*ROWS, row("late", 9, 1.0)], "late", "lora")
    with pytest.raises(ValueError, match="seed 1 of 'other' and of 'lora' read other data"):
        paired([*ROWS, row("other", 1, 1.0, data={"tokens_sha256": "another"})], "other", "lora")
    for more, words in (
        ({"versions": {"torch": "1.0"}}, "versions"),
        ({"config": {"device": "cuda"}}, "device"),
        ({"config": {"dtype": "float32"}, "versions": {"torch": "1.0"}}, "dtype and versions"),
    ):
        with pytest.raises(ValueError, match=f"seed 1 of 'other' and of 'lora': {words} differ"):
            paired([*ROWS, row("other", 1, 1.0, **more)], "other", "lora")
    larger = {"name": "large", "weights_sha256": "other", "config_sha256": "c"}
    with pytest.raises(ValueError, match="more than one model"):
        summary([*ROWS, row("lora", 5, 1.0, model=larger)], "lora")
    with pytest.raises(ValueError, match="claim is 'better'"):
        verdict(Interval(0, 0, 0, 3), "better")
    for claim in ("same", "lower"):
        with pytest.raises(ValueError, match="margin is 0.0: it must be above 0"):
            verdict(Interval(0, 0, 0, 3), claim, 0.0)
    with pytest.raises(ValueError, match="at least one value"):
        interval([])


def test_rows_come_back_from_their_file_and_know_each_other(tmp_path):
    path = tmp_path / "rows.jsonl"
    with open_results(path, ABLATIONS) as (rows, file):
        assert rows == []
        append_result(file, with_checksum(ROWS[0]))
    assert [{name: r[name] for name in ROWS[0]} for r in read_ablations(path)] == ROWS[:1]
    assert [part.state for part in verify_rows(path)] == ["ok"]
    assert identity(ROWS[0], ABLATIONS) == identity(row("another name", 0, 9.9), ABLATIONS)  # the config decides
    assert identity(ROWS[0], ABLATIONS) != identity(ROWS[1], ABLATIONS)  # another seed
    path.write_text(json.dumps(ROWS[0] | {"trainable": 0}) + "\n")
    with pytest.raises(ValueError, match="line 1 is not a row of an ablation .*trainable=0"):
        read_ablations(path)
    with pytest.raises(FileNotFoundError, match="none.jsonl does not exist"):
        read_ablations(tmp_path / "none.jsonl")
