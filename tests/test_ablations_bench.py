"""The bench of ablations: its settings are what their names say, its runs are pairs, and its page is made from rows."""

import json

import pytest
import torch

from bench import ablation_page as page, ablation_settings as settings, ablations as bench
from bench.ablation_settings import GROUPS, ONCE, RATES, SETTINGS, SIXTY, SMALL, Setting, lora, method_of
from qlora_lab.data.examples import Example
from qlora_lab.kernels import product
from qlora_lab.measure.ablations import CLAIMS, NOISE, SEEN, by_setting, paired, read_ablations, verdict
from qlora_lab.memory.predict import predict_memory
from qlora_lab.model.load import load
from qlora_lab.train.run_options import METHOD_OPTIONS

TINY = {
    "lora": lora(2, steps=2),
    "full": Setting("full", 1e-3, steps=2),
    "prompt": Setting("prompt", 1e-2, {"virtual_tokens": 3}, steps=2, rouge=True),
    "lora, nf4": lora(2, codebook="nf4", steps=2),
}
EXAMPLES = [
    Example((("user", f"the sum of {number}"), ("assistant", f"the two numbers {number}"))) for number in range(12)
]


def test_no_name_stands_for_two_settings():
    parts = [
        "ZOO",
        "LAYERS",
        "WEIGHTS",
        "RANKS",
        "LEARNING_RATES",
        "ALPHAS",
        "DROPOUTS",
        "MEMORY",
        "RATE_SEARCH",
        "SIXTY",
    ]
    assert len(SETTINGS) == sum(len(getattr(settings, name)) for name in parts)
    assert {name for names in GROUPS.values() for name in names} == set(SETTINGS)
    configs = [(repr(setting), "seed 0" in name) for name, setting in SETTINGS.items()]
    assert len(configs) == len(set(configs))  # no config has two names


def test_every_method_is_in_the_zoo_in_the_small_version_and_among_the_sixty_steps():
    every = set(METHOD_OPTIONS) - {"bitfit"} | {"lora+"}  # SmolLM2 has no biases: zero_bias stands for it
    for part in (settings.ZOO, SMALL, ONCE):
        assert {method_of(name).rstrip(",") for name in part} == every
    assert all(setting.steps == 60 for setting in SIXTY.values())


@pytest.mark.slow
def test_sizes_are_equal():
    def trained(name: str) -> int:
        options = {key: value for key, value in SETTINGS[name].options.items() if key != "alpha"}
        method = SETTINGS[name].method
        stored = {} if method == "lora" else {"codebook": "none"}
        ledger = predict_memory("smollm2-135m", method=method, **stored, **options)
        return sum(row.count for row in ledger.rows if row.group == "adapters")

    assert trained("lora r=16") == trained("prefix 424 tokens") == 4_884_480
    for name in ("houlsby size=70", "lora r=85, query and value", "lora r=42, attention", "lora r=26, feed-forward"):
        assert trained(name) == pytest.approx(4_884_480, rel=0.02)
    biases = [trained(name) for name in ("zero_bias", "lora r=1, four kinds of layer", "prompt 270 tokens")]
    assert biases == [155_520] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("houlsby size=101", "size"),
        ("prefix 303 tokens", "virtual_tokens"),
        ("prompt 57 tokens", "virtual_tokens"),
        ("lora r=55, nf4+dq", "r"),
    ],
)
def test_memory_is_as_equal_as_sizes_allow(name, option):
    product.keep(product.Race.won_by("bfloat16"))  # the sizes were chosen where bf16 products win

    def peak(setting: Setting, more: int = 0) -> int:
        options = {key: value for key, value in setting.options.items() if key not in ("alpha", "targets")}
        options |= {option: options[option] + more} if option in options else {}
        method = {"lora": "qlora" if setting.codebook else "lora"}.get(setting.method, setting.method)
        stored = {} if "lora" in method else {"codebook": "none"}
        how = {"batch_size": bench.BATCH, "length": bench.LENGTH, "device": "cpu", "dtype": "bfloat16"}
        how |= {"pair_attention": False}  # with torch's attention, for which the sizes were chosen
        return predict_memory("smollm2-135m", method=method, **how, **stored, **options).peak

    limit = peak(SETTINGS["lora r=16"])
    assert peak(SETTINGS[name]) <= limit < peak(SETTINGS[name], more=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dora r=16", "pissa r=16", "lora+ r=16", "loftq r=16, nf4+dq"])
def test_the_ledger_knows_every_relative_of_lora(name, folder):
    assert bench.memory(load(folder, progress=False)[0], SETTINGS[name]) > 0


def test_runs_follow_each_other_seed_by_seed_and_base_by_base():
    work = [(name, setting, seed) for name, setting in TINY.items() for seed in (1, 2)]
    names = [f"{name} {seed}" for name, _, seed in bench.in_order([*work, work[0]])]
    assert names == [f"{name} {seed}" for seed in (1, 2) for name in ("lora", "prompt", "full", "lora, nf4")]


@pytest.fixture
def recorded(folder, tmp_path, monkeypatch):
    """Records runs of a tiny model; `ran` lists those that were made."""
    ran = []
    real = bench.run
    monkeypatch.setattr(bench.ql, "load_data", lambda *args: EXAMPLES)
    monkeypatch.setattr(bench, "TEST", 3)
    monkeypatch.setattr(
        bench, "run", lambda base, setting, *args: ran.append(setting.method) or real(base, setting, *args)
    )

    def record(names=TINY, seeds=(1, 2)):
        work = [(name, TINY[name], seed) for seed in seeds for name in names]
        bench.record(str(folder), bench.in_order(work), tmp_path / "rows.jsonl")
        return read_ablations(tmp_path / "rows.jsonl")

    record.ran = ran
    return record


@pytest.mark.slow
def test_runs_are_pairs_and_a_stopped_call_goes_on(recorded):
    rows = recorded(["lora", "full"], [1])
    assert recorded.ran == ["lora", "full"]
    assert recorded()[:2] == rows and recorded.ran[2:4] == ["prompt", "lora"]  # known runs are not made again
    rows = recorded()
    assert len(recorded.ran) == len(rows) == 8
    for seed in (1, 2):
        assert len({json.dumps(row["data"]) for row in rows if row["seed"] == seed}) == 1
    assert len({row["data"]["train_sha256"] for row in rows}) == 2
    before = {name: {row["loss_before"] for row in runs} for name, runs in by_setting(rows).items()}
    assert before["lora"] == before["full"] == before["prompt"] != before["lora, nf4"]  # also after `full` has learned
    assert all(len(losses) == 1 for losses in before.values())
    assert all((row["rouge_l_after"] is not None) == (row["setting"] == "prompt") for row in rows)
    assert paired(rows, "full", "lora").n == 2


@pytest.mark.slow
def test_what_is_no_pair_is_not_recorded(recorded, monkeypatch):
    monkeypatch.setattr(bench, "shuffled", lambda examples, seed: examples)
    with pytest.raises(RuntimeError, match="in lora, finetune read other examples"):
        recorded(["lora"], [1])


@pytest.mark.slow
def test_a_changed_base_is_noticed(recorded, monkeypatch):
    def careless(model):
        model.get_input_embeddings().weight.data.add_(torch.ones(()))

    monkeypatch.setattr(bench.ql, "remove_adapter", careless)
    with pytest.raises(RuntimeError, match="the base is not what it was"):
        recorded(["lora"], [1])


ROWS = read_ablations()


def test_the_page_is_made_from_the_rows():
    text = page.PAGE.read_text("utf-8")
    assert page.in_page(text, ROWS) == text, "run: python bench/ablations.py --page"


def test_claims_and_tables_are_about_settings():
    named = {name for claim in page.CLAIMS for name in (claim.setting, claim.reference)}
    named |= {name for _, reference, names in page.TABLES for name in (reference, *names)}
    assert named <= set(SETTINGS)


def test_recorded_rows_are_of_the_settings_and_of_clean_commits():
    for row in ROWS:
        setting = SETTINGS[row["setting"]]
        config = json.loads(json.dumps(bench.asdict(setting)))
        assert config.items() <= row["config"].items(), row["setting"]
        assert row["loss_after"] < row["loss_before"] or "lr" in row["setting"]
        assert not row["commit"].endswith("-dirty")


def test_every_method_learns_within_sixty_steps():
    known = by_setting(ROWS)
    for name in SIXTY:
        assert all(row["loss_after"] < row["loss_before"] for row in known.get(name, [])), name


def test_the_page_names_the_methods_without_sixty_steps():
    rows = [row for row in ROWS if row["setting"] not in SIXTY]
    assert page.sixty(rows) == ""
    one = next(row for row in rows if row["setting"] == "lora r=16")
    assert "Not run for 60 steps" not in page.sixty([one | {"setting": name} for name in SIXTY])
    text = page.sixty([*rows, one | {"setting": "lora r=16, 60 steps"}])
    missing = [name.removesuffix(", 60 steps") for name in SIXTY if not name.startswith("lora r=16,")]
    assert f"Not run for 60 steps: {'; '.join(missing)}." in text


def test_every_method_that_is_compared_learns():
    known = by_setting(ROWS)
    for name in settings.METHODS:
        assert all(row["loss_after"] < row["loss_before"] for row in known[name]), name


def test_a_table_waits_for_all_of_its_group():
    names = GROUPS["rank"]
    assert page.table(ROWS, "Rank", "lora r=16", names)
    assert not page.table([row for row in ROWS if row["setting"] != "lora r=8"], "Rank", "lora r=16", names)


def test_a_single_seed_is_no_interval():
    rows = [row for row in ROWS if row["seed"] == settings.FIRST]
    lines = page.table(rows, "Rank", "lora r=16", GROUPS["rank"]).splitlines()[4:]
    assert all(line.count("(one seed)") >= 1 and " to " not in line for line in lines if line)


def test_no_claim_is_seen_beside_its_opposite():
    differences = {(c.setting, c.reference): paired(ROWS, c.setting, c.reference) for c in page.CLAIMS}
    for difference in differences.values():
        seen = [kind for kind in CLAIMS if verdict(difference, kind) == SEEN]
        assert len(seen) == (0 if verdict(difference, "same") == NOISE else 1)


def test_rates_that_were_not_looked_for_are_marked():
    known = by_setting(ROWS)
    for name in ("lora r=16, nf4+dq", "loftq r=16, nf4+dq", "dora r=16", "prompt 270 tokens", "lora r=8"):
        assert page.rate(name, known[name][0]).endswith(", rate not searched")
    for name in ("lora r=16", "lora+ r=16", "full", "lora r=1, four kinds of layer"):
        assert "not searched" not in page.rate(name, known[name][0])


def test_the_rates_are_the_best_that_were_tried():
    for name in settings.LOOKED_AT:
        assert RATES[method_of(name)] == page.best_rate(ROWS, name), name
