"""`qlora-lab experts`: the figures are those of expert_use, in rows or in a line for each layer."""

import json
from dataclasses import asdict

import pytest
import torch

import qlora_lab as ql
from qlora_lab import cli
from qlora_lab.measure.expert_use import expert_use
from qlora_lab.measure.perplexity import text_windows
from qlora_lab.quant.plan import Candidate
from tests.model.families import tiny

WORDS = ["--windows", "2", "--length", "12", "--block-size", "32", "--quiet"]


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("the sum of the two numbers is a number. " * 9)
    return tmp_path / "text.txt"


@pytest.fixture
def mixture(tmp_path, tokenizer):
    tiny("Qwen3Moe", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "mixture")
    tokenizer.save_pretrained(tmp_path / "mixture")
    return tmp_path / "mixture"


def test_rows_are_those_of_expert_use(mixture, text, capsys):
    capsys.readouterr()  # what saving said
    assert cli.main(["experts", str(mixture), "--text", str(text), *WORDS, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    model, tokenizer = ql.load(mixture, codebook=None, dtype=torch.float32, progress=False)
    ids = text_windows(tokenizer, text.read_text(), 12, 2)
    batches = [{"input_ids": row[None]} for row in ids]
    want = expert_use(model, tokenizer, batches, Candidate("nf4", 32, True), progress=False)
    assert [row["tokens"] for row in rows] == [row.tokens for row in want]
    assert [row["change"] for row in rows] == pytest.approx([row.change for row in want])
    assert asdict(want[0]).keys() == rows[0].keys() and len(rows) == 2 * 4


def test_a_line_for_each_layer_names_the_busiest(mixture, text, capsys):
    capsys.readouterr()
    assert cli.main(["experts", str(mixture), "--text", str(text), *WORDS]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "layer" and [line.split()[0] for line in lines] == [
        f"model.layers.{layer}.mlp.experts" for layer in (0, 1)
    ]
    for line in lines:
        counts = [int(pair.split(": ")[1]) for pair in line.split("nats")[1].split(", ")]
        assert counts == sorted(counts, reverse=True) and sum(counts) == 2 * 12 * 2  # a token takes two experts


def test_a_dense_model_is_refused_before_it_is_loaded(folder, text, capsys, monkeypatch):
    monkeypatch.setattr(ql, "load", None)  # which takes minutes
    capsys.readouterr()
    assert cli.main(["experts", str(folder), "--text", str(text), *WORDS]) == 2
    said = " is a LlamaForCausalLM, which has no experts: give a mixture, such as allenai/OLMoE-1B-7B-0924\n"
    assert capsys.readouterr().err.endswith(said)


def test_the_data_type_is_one_to_try(mixture, text, capsys):
    with pytest.raises(SystemExit):
        cli.main(["experts", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "data type to try on each expert, such as nf4, fp4 or int4: how much the loss would rise" in said
    assert "none: do not quantise" not in said
    assert cli.main(["experts", str(mixture), "--codebook", "none", "--text", str(text), "--quiet"]) == 2
    assert "'none'" in capsys.readouterr().err
