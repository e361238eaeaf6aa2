"""The bench runs from end to end, and docs/speed.md says what its JSON says. No test asserts a time."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import (
    block_size,
    cpu,
    data_types,
    decode_page,
    elo_rules,
    many_adapters,
    multiple_choice,
    notebooks,
    seven_b,
    steps,
    tournament,
    train_step,
    widgets,
)
from bench.render import BEGIN, END, ROWS, find, in_page, table
from bench.timing import in_turn, peak_bytes
from qlora_lab.measure.latency import orders
from tests import warm
from tests.explorers import explorers

ROOT = Path(__file__).parent.parent
RESULT = json.loads((ROOT / "bench" / "cpu.json").read_text("utf-8"))


def test_a_notebook_that_is_measured_again_leaves_the_other_rows(tmp_path, monkeypatch):
    """Each row says when and where it was measured, but not on whose machine."""
    stored = json.loads((ROOT / "bench" / "notebooks.json").read_text("utf-8"))["notebooks"]
    assert all(row["date"] and len(row["system"].split()) == 2 for row in stored.values())  # Linux x86_64
    earlier, now = {"peak_bytes": 1, "date": "2026-01-01"}, {"peak_bytes": 2, "seconds": 1.0, "date": "2026-02-02"}
    out = tmp_path / "notebooks.json"
    out.write_text(json.dumps({"notebooks": {"02_packing": earlier}}))
    monkeypatch.setattr(notebooks, "measured", lambda path: now)
    notebooks.main(["01_codebook", "--out", str(out)])
    assert json.loads(out.read_text()) == {"notebooks": {"01_codebook": now, "02_packing": earlier}}


def test_the_page_is_made_from_the_json():
    page = (ROOT / "docs" / "speed.md").read_text("utf-8")
    assert in_page(page, RESULT) == page, "run: python bench/cpu.py --render"
    assert (ROOT / "bench" / "cpu.png").stat().st_size > 10_000


def test_so_is_its_section_on_steps():
    page = (ROOT / "docs" / "speed.md").read_text("utf-8")
    seven_b = json.loads((ROOT / "bench" / steps.SEVEN_B).read_text("utf-8"))
    found = steps.stored(ROOT / "bench" / steps.TRAIN_STEP), seven_b
    assert steps.in_page(page, *found) == page, "run: python bench/steps.py"


def test_a_result_replaces_only_the_one_of_its_processor(tmp_path):
    file = tmp_path / "steps.json"
    for processor, figure in (("one", 1), ("other", 2), ("one", 3)):
        steps.keep(file, {"processor": processor, "figure": figure})
    assert [result["figure"] for result in steps.stored(file)] == [2, 3]
    assert steps.of_processor(file, "one")["figure"] == 3 and steps.of_processor(file, "none") is None


def test_so_is_its_section_on_answers():
    result = json.loads(decode_page.STORED.read_text("utf-8"))
    page = decode_page.PAGE.read_text("utf-8")
    assert decode_page.in_page(page, result) == page, "run: python bench/decode_page.py"


def test_so_is_the_page_of_many_adapters():
    page = many_adapters.PAGE.read_text("utf-8")
    result = json.loads(many_adapters.OUT.read_text("utf-8"))
    assert many_adapters.in_page(page, result) == page, "run: python bench/many_adapters.py --render"
    assert all(case["ratio"]["eight"]["median"] <= 1.5 for case in result["cases"])  # what was recorded
    assert result["memory"]["bytes"]["held"] == result["memory"]["bytes"]["predicted"]


def test_so_is_the_page_of_multiple_choice():
    page = multiple_choice.PAGE.read_text("utf-8")
    result = json.loads(multiple_choice.OUT.read_text("utf-8"))
    assert multiple_choice.in_page(page, result) == page, "run: python bench/multiple_choice.py --render"
    for way, models in result["answers"].items():
        assert list(models) == list(multiple_choice.VARIANTS)
        shares = [row["acc"]["over_questions"] for row in models.values()]
        assert all(low <= share <= high for share, low, high in shares)
        assert models["bf16 weights"]["acc"]["difference"] is None, way


def test_every_row_of_the_page_was_measured():
    for label, (*key, peer) in ROWS.items():
        for rows in RESULT["allocators"].values():
            row = find(rows, *key)
            assert row and {"ours", peer} <= set(row["seconds"]), label
            assert all(s["rounds"] >= 9 and s["low"] <= s["median"] <= s["high"] for s in row["seconds"].values())


def test_the_table_has_every_contender():
    text = table(RESULT)
    rows = [row for rows in RESULT["allocators"].values() for row in rows]
    assert text.count(" x 1.00") >= len(rows) and text.count("torchao") > 5 and RESULT["processor"] in text


def test_a_page_without_the_marks_is_refused():
    with pytest.raises(ValueError, match="docs/speed.md needs one line"):
        in_page(f"{BEGIN} {BEGIN} {END}", RESULT)


def test_contenders_run_in_turn():
    order = []
    result = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, sample=0)
    assert "".join(order) == "aabb" + "".join(map("".join, orders("ab", 3)))
    assert result["a"]["rounds"] == 3 and result["a"]["calls"] == 1


def test_so_is_the_table_of_tournaments():
    result = json.loads(tournament.OUT.read_text("utf-8"))
    assert not result["quick"] and tournament.table(result) in tournament.PAGE.read_text("utf-8"), (
        "run it with --render"
    )


def test_what_the_rules_of_elo_change_was_recorded():
    """The figures that LOG.md quotes."""
    result = json.loads((ROOT / "bench" / "elo_rules.json").read_text("utf-8"))
    assert result["published"] == elo_rules.table_1() and len(result["rules"]) == 12
    assert min(row["farthest"] for row in result["rules"]) > 17  # none of them is the paper's
    far = {(row["k"], row["unread"], row["both_orders"]): row["farthest"] for row in result["rules"]}
    assert far[32, "tie", "apart"] == 26.6 and far[32, "left out", "tie if they differ"] == 21.7
    assert far[16, "tie", "mean"] == min(far.values()) == 17.7
    assert (result["answers read in both orders"], result["with one verdict"]) == (2227, 1367)
    over_questions, over_games = result["bradley_terry"]
    widths = [
        fit["ratings"]["65b-guanaco"][2] - fit["ratings"]["65b-guanaco"][1] for fit in (over_questions, over_games)
    ]
    assert 1.8 < widths[0] / widths[1] < 2.2  # the same games: without their questions, half the width


def test_the_x_ray_of_4_gb_held_less_than_200_mib():
    result = json.loads((ROOT / "bench" / "xray.json").read_text("utf-8"))
    assert result["file_bytes"] > 4e9 and len(result["looks"]) == 8
    assert max(look["bytes"] for look in result["looks"].values()) < 200 * 2**20


def test_the_page_of_merges_has_the_measured_verdicts():
    page = (ROOT / "docs" / "merge.md").read_text("utf-8")
    merges = json.loads((ROOT / "bench" / "small_adapters.json").read_text("utf-8"))["merges"]
    for one in merges:
        kls = " | ".join(f"{one[name]:.1e}" for name in ("adapter_kl", "kl", "base_kl"))
        arrived = "" if one["arrived"] is None else f"{one['arrived']:.2g}"
        row = f"| {one['size']:.0e} | `{one['target']}` | {kls} | {arrived} | `{one['verdict']}` |"
        assert row.replace("e-0", "e-") in page
    assert len(merges) == 6


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells")
def test_peak_memory_sees_what_is_allocated():
    peak = peak_bytes(lambda: bytearray(b"1") * 2**26)
    assert 0.9 * 2**26 <= peak < 2**27  # other pages come and go


@pytest.fixture
def run_bench(monkeypatch, tmp_path, capsys):
    """Runs a bench's main here, with these words; returns its JSON and what it printed.

    What it starts as processes of its own comes from tests/warm.py, half a minute cheaper for a bench with six.
    """

    def run(bench, *words):
        out = tmp_path / "result.json"
        monkeypatch.setattr(sys, "argv", [bench.__file__, "--quick", "--out", str(out), *map(str, words)])
        bench.main()
        return json.loads(out.read_text()), capsys.readouterr().out

    return run


@pytest.mark.slow
def test_it_runs_from_end_to_end(monkeypatch, tmp_path, run_bench):
    said = []

    def run(command, env=None, cwd=None, check=False, stdout=None, stderr=None, text=True):
        """Kernels come from the cache of every other test: to compile them twice takes half a minute."""
        environment = {name: value for name, value in (env or os.environ).items() if name != "NUMBA_CACHE_DIR"}
        words = [word for word in command if word not in ("-W", "ignore")]  # options of an interpreter
        done = warm.run(words, cwd=cwd, env=environment, check=check)
        said.append(done.stdout)
        return done

    monkeypatch.setattr(cpu, "subprocess", SimpleNamespace(run=run, PIPE=None, DEVNULL=None))
    result, printed = run_bench(cpu)
    assert set(result["allocators"]) == {"stock", "recycling"} and (tmp_path / "result.png").exists()
    assert set(result["cold_start"]) >= {"import torch", "import qlora_lab", *cpu.FIRST_CALLS}
    assert all(len(result["cold_start"][name]) == 2 for name in cpu.FIRST_CALLS)
    works = {row["work"] for row in result["allocators"]["stock"]}
    assert works >= {"quantise", "dequantise", "forward", "forward and backward", "LoRA layer step", "quantise, growth"}
    assert "cold start" in printed and all("bitsandbytes" in half for half in said[-2:])
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "result.png"}


@pytest.mark.slow
def test_the_bench_of_paging_runs(tmp_path):
    command = [sys.executable, "bench/paging.py", "--quick", "--out", str(tmp_path / "paging.json")]
    done = warm.run(command, cwd=ROOT, check=True)
    result = json.loads((tmp_path / "paging.json").read_text())
    assert result["state_bytes"] == 8 * 2**12 and set(result["seconds"]) == {
        "torch.optim.AdamW", "all in memory", "a quarter", "a tenth", "copy",
    }  # fmt: skip
    assert result["events_of_a_step"]["all in memory"] == {}  # every page stays
    assert result["events_of_a_step"]["a tenth"] == {"write back": 8, "evict": 8, "fault": 8}  # eight pages, one frame
    assert {"a tenth", "a tenth, no prefetch"} < set(result["prefetch"]["1"])
    assert {"8 bits", "8 bits, readable code", "32 bits"} < set(result["eight_bits"]["seconds"])
    assert "a tenth" in done.stdout and [p.name for p in tmp_path.iterdir()] == ["paging.json"]


@pytest.mark.slow
def test_the_bench_of_a_training_step_runs(monkeypatch, tmp_path, run_bench):
    monkeypatch.setattr(train_step, "multiprocessing", SimpleNamespace(get_context=lambda _: warm.context()))
    (result,), printed = run_bench(train_step)
    (case,) = result["cases"]
    contenders = {"ours", "unquantised"} | {
        f"PEFT, {model}, {allocator}" for model in ("prepared", "as loaded") for allocator in ("stock", "recycled")
    }
    for found in ("seconds", "ratio", "peak_bytes", "loss_of_third_step", "profile"):
        assert set(case[found]) == contenders, found
    losses = dict(case["loss_of_third_step"])
    exact = losses.pop("unquantised")  # the same work on other weights: NF4's error is between them
    assert max(losses.values()) - min(losses.values()) < 0.01, losses
    assert all(abs(loss - exact) < 0.1 for loss in losses.values()), (exact, losses)
    groups = {"base products", "kernels of the layers", "attention", "head and loss"}
    assert groups <= set(case["profile"]["ours"])
    assert "PEFT, prepared, stock" in printed and [p.name for p in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.slow
def test_the_bench_of_a_7b_model_runs(monkeypatch, tmp_path, run_bench):
    def run(command, stdout, text):
        return warm.run(command, check=True)

    monkeypatch.setattr(seven_b, "subprocess", SimpleNamespace(run=run, PIPE=None))
    result, _ = run_bench(seven_b, "--scratch", tmp_path)
    stages = result["stages"]
    assert list(stages) == ["load", "quantise", "map_again", "step", "answer"]
    assert stages["step"]["tokens"] == 512 and stages["step"]["learned_tokens"] == 64
    assert stages["map_again"]["folder_bytes"] < 0.75 * 2 * 157_696  # of all parameters in bf16, a third in embeddings
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]  # 14 GB of scratch would be missed


@pytest.mark.slow
def test_the_bench_of_block_sizes_runs(monkeypatch, tmp_path, saved_llama, run_bench):
    """On a tiny model: which type loses more on true weights is what tests/measure/test_perplexity.py shows."""
    monkeypatch.setattr(block_size, "MODEL", str(saved_llama))
    result, printed = run_bench(block_size)
    models = result["models"]
    assert models["nf4/64 for all"]["bits"] == 4.5 >= models["nf4, 4.5 bits"]["bits"] > 4.49
    assert models["any type, 4.5 bits"]["expected_nats"] <= models["nf4, 4.5 bits"]["expected_nats"]
    assert models["nf4, 4.5 bits"]["expected_nats"] < models["nf4/64 for all"]["expected_nats"]
    assert models["nf4/64 for all"]["more_nats"] == {"mean": 0, "low": 0, "high": 0}
    assert models["not quantised"]["more_nats"]["mean"] != 0 and "not quantised" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.slow
def test_the_bench_of_data_types_runs(monkeypatch, tmp_path, saved_llama, run_bench):
    """All settings, on a tiny model, as above."""
    monkeypatch.setattr(data_types, "MODEL", str(saved_llama))
    result, printed = run_bench(data_types, "--results", tmp_path / "rows.jsonl")
    settings = result["settings"]
    assert settings["nf4, blocks of 64"]["bits_per_parameter"] == 4.5 and len(settings) == 18
    assert settings["nf4, blocks of 64"]["more_nats_than_nf4"] == {"mean": 0, "low": 0, "high": 0}
    wide, fine = (f"{name}, blocks of 64" for name in ("e3m0", "e2m1"))
    assert settings[wide]["relative_error"] > settings[fine]["relative_error"]
    nats = [settings[name]["more_nats_than_nf4"]["mean"] for name in (wide, fine)]
    assert result["more_nats"][f"{wide} less {fine}"]["mean"] == pytest.approx(nats[0] - nats[1])
    assert wide in printed and {path.name for path in tmp_path.iterdir()} == {"result.json", "rows.jsonl"}


def test_every_explorer_of_the_course_is_timed():
    ours = {made.__name__ for made in explorers()}
    assert set(widgets.EXPLORERS) == ours
    assert set(json.loads(widgets.JSON.read_text("utf-8"))["explorers"]) == ours, "run: python bench/widgets.py"
