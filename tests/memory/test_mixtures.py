"""Ledgers of mixtures of experts: every measured row to the byte, and the peak of a real step."""

import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import qlora_lab as ql
from qlora_lab.cli import main
from qlora_lab.memory.measured import measure_memory
from qlora_lab.memory.setup import Setup
from qlora_lab.memory.shape import Shape, shape_of
from qlora_lab.memory.weights import measured_weights
from qlora_lab.memory.work import nothing_added, work
from qlora_lab.model.experts4bit import Stack4bit
from qlora_lab.model.quantised import options_of, put, quantised
from qlora_lab.quant.plan import Candidate
from tests.memory.test_predict import UNSEEN, assert_peak, batch_of, differences, measured
from tests.model.families import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
NF4 = Candidate("nf4", 64, True)
NARROW, WIDE = torch.bfloat16, torch.float32
METHODS = ["qlora", "lora", "full"]
OTHERS = ["rslora", "dora", "pissa", "prefix", "prompt"]  # Houlsby's adapters are refused


def build(family, method, dtype=WIDE, options=NF4, targets="all-linear", **sizes):
    """A random mixture as load and add_lora leave it; method "base": packed, without adapters; None: as it is."""
    model = tiny(family, **{"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 3} | sizes)
    rotary = model.model.rotary_emb
    model.to(dtype).model.rotary_emb = type(rotary)(config=model.config)  # its frequencies stay float32
    if method in ("qlora", "base"):
        pack(model, options_of(model, options, None))
    if method in ("qlora", "lora"):
        return ql.add_lora(model, r=8, targets=targets)
    if method in ("base", None):
        return model
    ranks = {"r": 18} if method in ("rslora", "dora", "pissa") else {}  # no width of these models
    return ql.add_adapter(model, method, **ranks)


def pack(model, options):
    for path, chosen in options.items():
        weight = model.state_dict().get(path, model.state_dict().get(f"{path}.weight"))
        put(model, path, quantised(model, path, weight, chosen))


CASES = [
    ("Mixtral", "qlora", WIDE),
    ("Qwen3Moe", "qlora", NARROW),
    ("Mixtral", "lora", NARROW),
    ("Qwen3Moe", "full", WIDE),
    ("Qwen2Moe", "full", NARROW),
    ("Olmoe", "qlora", NARROW),
]
MIXTURES = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe")
REST = [(family, method, dtype) for family in MIXTURES for method in METHODS for dtype in (WIDE, NARROW)]
REST += [(family, method, NARROW) for family in ("Qwen2Moe", "Qwen3Moe") for method in OTHERS]
REST += [("Qwen2Moe", "bitfit", NARROW), ("Qwen3Moe", "zero_bias", NARROW)]  # only the first has biases
REST += [("Qwen3", "qlora", WIDE), ("Qwen3", "full", NARROW)]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in REST if case not in CASES]


@pytest.mark.parametrize("family, method, dtype", [*CASES, *SLOW])
def test_every_row_is_right_to_the_byte(family, method, dtype):
    assert not differences(measured(build(family, method, dtype), batch_of()))


# Without adapters before the first layer's experts, no gradient reaches their router and their input.
ON_EXPERTS = [
    ("Mixtral", "qlora", NARROW, "experts"),
    ("Qwen3Moe", "lora", NARROW, "all"),
    ("Qwen3Moe", "lora", WIDE, ("experts.down_proj",)),
    ("Mixtral", "qlora", WIDE, ("gate_up_proj", "o_proj")),
    ("Qwen2Moe", "qlora", NARROW, "shared-experts"),
    ("Qwen2Moe", "lora", NARROW, ("down_proj", "experts.down_proj")),
]
EACH = ("experts", "all", ("down_proj",), ("experts.gate_up_proj", "o_proj"))
REST_ON_EXPERTS = [
    pytest.param(family, method, dtype, targets, marks=pytest.mark.slow)
    for family in MIXTURES
    for method in ("qlora", "lora")
    for dtype in (WIDE, NARROW)
    for targets in EACH
]


@pytest.mark.parametrize("family, method, dtype, targets", [*ON_EXPERTS, *REST_ON_EXPERTS])
def test_so_is_every_row_of_adapters_on_experts(family, method, dtype, targets):
    """36 tokens use all four experts of a layer: the ledger assumes that each casts its pair."""
    assert not differences(measured(build(family, method, dtype, targets=targets), batch_of()))


@pytest.mark.slow  # cases more
@pytest.mark.parametrize("method, r, recompute", [("rslora", 18, False), ("lora", 1, False), ("lora", 18, True)])
def test_so_it_is_of_other_strengths_ranks_and_layers_computed_again(method, r, recompute):
    model = ql.add_adapter(build("Qwen2Moe", "base", NARROW), method, r=r, targets=("experts", "o_proj"))
    unseen = UNSEEN | ({"rotary cosines and sines"} if recompute else set())
    assert not differences(measured(model, batch_of(), recompute=recompute), unseen)


def test_pairs_of_experts_by_hand():
    """Two layers of four experts: gate and up 64 x 16, down 16 x 32; so r (16 + 64) and r (32 + 16) a pair."""
    shape = shape_of(tiny("Mixtral").config)
    ledger = ql.predict_memory(shape, r=8, targets="experts")
    assert ledger.row("lora_A").count == 2 * 4 * 8 * (16 + 32)
    assert ledger.row("lora_B").count == 2 * 4 * 8 * (64 + 16)
    assert ledger.row("gradients").predicted == ledger.group("adapters") == 4 * 2 * 4 * 8 * (80 + 48)
    pairs = ledger.row("gradients of pairs")  # of one layer at a time, in float32
    assert (pairs.count, pairs.predicted) == (4 * 8 * (80 + 48), 4 * 4 * 8 * (80 + 48))
    assert ledger.row("step counters").count == 2 * 4  # the pairs of all experts lie in two tensors
    assert ql.fit(shape, 24, targets="experts").rank == 16  # more than the narrower side expresses nothing


OPTIONS = [Candidate("int3", 32, False), Candidate("nf4", 4096, True)]


@pytest.mark.parametrize("options", OPTIONS)
def test_so_is_every_row_of_other_data_types_and_blocks(options):
    """Blocks of 4096 weights reach over a whole matrix, and never into the next expert."""
    assert not differences(measured(build("Qwen3Moe", "qlora", options=options, num_hidden_layers=1), batch_of()))


def test_a_recomputed_layer_keeps_its_input():
    ledger = measured(build("Mixtral", "qlora", NARROW), batch_of(), recompute=True)
    assert not differences(ledger, UNSEEN | {"rotary cosines and sines"})


@pytest.mark.parametrize("method", ["base", None])
@pytest.mark.parametrize("family", MIXTURES)
def test_a_model_that_only_answers_stores_and_uses_what_the_weight_ledger_says(family, method):
    model = build(family, method, NARROW, num_experts_per_tok=1)
    ledger, weights = measure_memory(model), measured_weights(model)
    assert not differences(ledger, {row.what for row in ledger.rows if row.group != "weights"})
    # tables and frequencies are not weights of a file
    beside = sum(row.predicted for row in ledger.rows if row.what in ("tables", "rotary frequencies"))
    assert ledger.group("weights") - beside == weights.stored
    assert ledger.active - beside == weights.active < weights.stored
    assert ledger.to_dict()["active_weights"] == ledger.active


def test_active_bytes_by_hand():
    """Two layers of four experts, one of them used: gate and up 64 x 16, down 16 x 32; 4 bits and a constant of 64."""
    shape = shape_of(tiny("Mixtral", num_experts_per_tok=1).config)
    matrices = (64 * 16, 16 * 32)
    expert = sum(n // 2 + n // 64 + 4 + 4 for n in matrices)  # codes, constants, their scale and offset
    ledger = ql.predict_memory(shape)
    assert ledger.idle == 2 * 3 * expert
    assert f"a token uses {ledger.active:,} of the {ledger.group('weights'):,} bytes of weights" in str(ledger)
    assert ql.predict_memory(shape, "lora").idle == 2 * 3 * sum(matrices) * 2
    dense = ql.predict_memory("llama-7b")
    assert dense.idle == 0 and dense.active == dense.group("weights") and "a token uses" not in str(dense)


def test_mixtral_8x7b_has_the_sizes_of_its_paper():
    """Mixtral (arXiv 2401.04088), table 1 and section 3: 47B parameters; a token uses 13B."""
    shape = Shape("mixtral-8x7b", "mixtral", 32, 4096, 14336, 32, 8, 128, 32000, False, experts=8, experts_per_token=2)
    expert = sum(matrix.numel for matrix in shape.expert)
    assert shape.parameters == pytest.approx(47e9, rel=0.01)
    assert shape.parameters - 32 * 6 * expert == pytest.approx(13e9, rel=0.01)


def test_operations_are_those_of_the_experts_in_use():
    model = tiny("Mixtral")
    model.config._attn_implementation = model.config._experts_implementation = "eager"  # torch counts their parts
    ids = torch.arange(3, 13)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=1)
    assert counter.get_total_flops() == nothing_added(shape_of(model), Setup(method="full"), tokens=10)


def test_operations_of_adapters_are_those_of_the_experts_in_use():
    model = ql.add_lora(tiny("Mixtral"), r=4, targets="all")
    model.config._attn_implementation = "eager"  # torch counts its parts
    ids = torch.arange(3, 13)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=1)
    assert counter.get_total_flops() == work(shape_of(model), Setup(method="lora", r=4, targets="all"), tokens=10)


@pytest.mark.long
def test_half_a_mixture_is_refused():
    model = build("Mixtral", None)
    pack(model, {path: o for path, o in options_of(model, NF4, None).items() if "down_proj" not in path})
    with pytest.raises(
        ValueError, match="3 of 6 stacks of experts are quantised beside 12 linear layers: quantise all"
    ):
        measure_memory(model)
    model = build("Mixtral", "base")
    stack = next(module for module in model.modules() if isinstance(module, Stack4bit))
    path = next(path for path, module in model.named_modules() if module is stack)
    other = build("Mixtral", "base", options=Candidate("fp4", 64, True))
    stack.weight = other.get_submodule(path).weight
    with pytest.raises(ValueError, match="layers are quantised in 2 ways"):
        measure_memory(model)


def test_targets_are_those_of_add_lora():
    shape = shape_of(tiny("Mixtral").config)
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert ql.predict_memory(shape, targets="attention").rows == ql.predict_memory(shape).rows
    assert ql.predict_memory("llama-7b", targets="attention").rows == ql.predict_memory("llama-7b", targets=names).rows
    assert ql.predict_memory("llama-7b", targets="all").rows == ql.predict_memory("llama-7b").rows  # nothing else
    with pytest.raises(ValueError, match="targets .'experts'.: choose 'all-linear', 'attention', 'all' or from q_proj"):
        ql.predict_memory("llama-7b", targets="experts")
    with pytest.raises(
        ValueError, match="'experts', 'all' or from q_proj, .*o_proj, experts.gate_up_proj, experts.down"
    ):
        ql.predict_memory(shape, targets=["experts", "router"])


@pytest.mark.parametrize(
    "setup, message",
    [
        ({"method": "dora"}, "method='dora' cannot adapt experts: choose qlora, lora, rslora, or leave experts out"),
        ({"dropout": 0.1}, "dropout=0.1 cannot be beside experts: set dropout=0, or leave experts out of targets"),
    ],
)
def test_what_cannot_be_beside_experts_is_refused(setup, message):
    shape = shape_of(tiny("Mixtral").config)
    with pytest.raises(ValueError, match=message):
        ql.predict_memory(shape, targets=["q_proj", "down_proj"], **setup)
    assert ql.predict_memory(shape, targets="attention", **setup).row("lora_A").count  # it can be elsewhere


def test_houlsby_is_refused_before_anything_is_counted():
    with pytest.raises(ValueError, match="routes tokens to experts, which method='houlsby' cannot adapt: choose qlora"):
        ql.predict_memory(tiny("Mixtral"), "houlsby")


def test_the_command_line_counts_a_mixture_and_names_a_family_that_it_cannot(tmp_path, capsys):
    (tmp_path / "config.json").write_text(tiny("Mixtral").config.to_json_string())
    assert main(["memory", str(tmp_path), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["active_weights"] < figures["stored_weights"] == figures["groups"]["weights"]
    assert main(["memory", str(tmp_path), "--json", "--targets", "attention", "experts"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"]["adapters"] > figures["groups"]["adapters"]
    (tmp_path / "config.json").write_text(tiny("GptOss").config.to_json_string())
    assert main(["memory", str(tmp_path)]) == 2
    assert "'gpt_oss', whose layers are unknown here: choose from llama, " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a process's peak is read from /proc")
@pytest.mark.parametrize("family, targets", [("Mixtral", "attention"), ("Mixtral", "all"), ("Qwen2Moe", "all")])
@pytest.mark.parametrize("recompute, rows", [(False, 2), (True, 4)])
def test_peak_of_a_step_of_a_mixture(recompute, rows, family, targets, tmp_path, tiny_llama, tokenizer):
    """Six layers of eight experts of 256 x 512: large enough that a process's own pages are a small part."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
    sizes |= {"head_dim": 64, "max_position_embeddings": 512, "vocab_size": 2000}
    shared = {"num_experts": 8, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 1024}
    sizes |= shared if family == "Qwen2Moe" else {"num_local_experts": 8}
    for name, model in (("small", tiny_llama), ("mixture", tiny(family, **sizes))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    assert_peak(tmp_path / "mixture", tmp_path / "small", recompute, rows, targets)
