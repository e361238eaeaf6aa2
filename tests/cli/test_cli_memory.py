"""`qlora-lab memory`: a ledger or a plan, as text or JSON; a mistake is one line and code 2."""

import json

import pytest
from transformers import LlamaConfig

import qlora_lab as ql
from qlora_lab import cli


def run(capsys, *argv):
    code = cli.main(["memory", *(str(a) for a in argv)])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_ledger_is_that_of_the_library(capsys):
    options = ["--r", "64", "--max-length", "512", "--gradient-checkpointing", "--targets", "q_proj", "v_proj"]
    code, out, _ = run(capsys, "llama-7b", *options, "--optimizer-budget", "64MiB", "--json")
    how = {"r": 64, "length": 512, "gradient_checkpointing": True, "targets": ("q_proj", "v_proj")}
    ledger = ql.predict_memory("llama-7b", **how, optimizer_budget=64 * 2**20)
    assert code == 0 and json.loads(out) == json.loads(json.dumps(ledger.to_dict()))
    code, out, _ = run(capsys, "llama-7b", "--method", "full")
    assert code == 0 and out == f"{ql.predict_memory('llama-7b', 'full')}\n"


def test_a_card_gives_a_plan(capsys):
    code, out, _ = run(capsys, "llama-7b", "--gpu", "24", "--json")
    found = json.loads(out)
    assert code == 0 and found["fits"] and found["chosen"]["peak"] + found["free"] == 24 * 2**30
    assert set(found["settings"]) <= set(ql.Settings.__dataclass_fields__)
    code, out, _ = run(capsys, "llama-7b", "--gpu", "24")
    assert code == 0 and "fits on a card of 24 GiB" in out and "gradient checkpointing" in out


def test_what_does_not_fit_is_code_1(capsys):
    code, out, _ = run(capsys, "llama-2-70b", "--gpu", "24")
    assert code == 1 and "GiB are missing" in out


def test_a_config_is_enough(capsys, tmp_path):
    config = LlamaConfig(hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4)
    (tmp_path / "config.json").write_text(config.to_json_string())
    code, out, _ = run(capsys, tmp_path, "--device", "cpu", "--dtype", "float32")
    assert code == 0 and "packed weights" in out


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        (["--gpu", "0"], {}, "gpu_gb=0.0 is not allowed: it is the memory of a card, above 0 GB"),
        ([], {"hidden_size": None}, "config.json has hidden_size=None"),
        ([], {"model_type": "gpt2"}, "'gpt2', whose layers are unknown here: choose from llama, mistral, qwen2"),
        (["--method", "magic"], {}, "method='magic' is not known"),
        (["--targets", "nosuch"], {}, "targets ['nosuch']: choose 'all-linear', 'attention', 'all' or from q_proj"),
        (["--targets", "experts"], {}, "targets ['experts']: choose 'all-linear', 'attention', 'all' or from q_proj"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(capsys, tmp_path, options, config, message):
    given = LlamaConfig(hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(given | config))
    code, out, err = run(capsys, tmp_path, *options)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_an_unknown_name_lists_the_known(capsys):
    code, _, err = run(capsys, "nosuch")
    assert code == 2 and "choose one of smollm2-135m, llama-7b" in err
