"""A resume is of the same base, to the last bit, and of the same arithmetic, or it says what differs."""

import hashlib
import json
import os

import pytest
import torch

import qlora_lab as ql
from qlora_lab import cli
from qlora_lab.data.examples import Example
from qlora_lab.kernels import product
from qlora_lab.train import identity
from qlora_lab.train.checkpoint import saved_steps
from qlora_lab.train.identity import arithmetic, base_checksum
from qlora_lab.train.settings import Settings
from qlora_lab.train.trainer import Training

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = [Example((("user", f"{i} and {i}"), ("assistant", "two"))) for i in range(4)]


def quantised(folder, double_quant=True):
    model, tokenizer = ql.load(folder, double_quant=double_quant, dtype=torch.float32, progress=False)
    return ql.add_lora(model, r=2), tokenizer


def training(folder, out, change=lambda model: None, **options):
    model, tokenizer = quantised(folder)
    change(model)
    settings = Settings(steps=3, batch_size=2, save_every=1)
    return Training(model, tokenizer, EXAMPLES, out, settings, progress=False, **options)


@pytest.fixture
def stopped(folder, tmp_path):
    """The folder of a run that was stopped after its first step."""
    for _ in (first := training(folder, tmp_path / "run")):
        first.stop()
    return tmp_path / "run"


def resume(folder, out, **options):
    return training(folder, out, resume=True, **options).run()


# ------------------------------------------------------------------------------------------------------------- the base


def last_of_embeddings(model):
    weight = model.model.embed_tokens.weight
    with torch.no_grad():
        weight[-1, -1] += 1


def last_block_constant(model):
    """A matrix of twice the size: its codes are the same in every block, its constants are not."""
    model.model.layers[1].mlp.up_proj.base.weight.constants.absmax_scale.mul_(2)


def last_level(model):
    weight = model.model.layers[1].mlp.up_proj.base.weight
    weight.levels.data = weight.levels.clone()  # one table serves all layers
    weight.levels[-1] = 0.99


@pytest.mark.long
@pytest.mark.parametrize("change", [last_of_embeddings, last_block_constant, last_level])
def test_another_base_is_not_resumed_wherever_it_differs(folder, stopped, change):
    with pytest.raises(
        ValueError, match=r"a different run, .*: base_sha256: \w{64} in the checkpoint, \w{64} now\. Use"
    ):
        resume(folder, stopped, change=change)


@pytest.mark.long
@pytest.mark.parametrize("double_quant", [True, False])
def test_every_bit_of_the_base_counts_and_none_of_the_adapter(folder, double_quant):
    model = quantised(folder, double_quant)[0]
    whole, seen = base_checksum(model), set()
    tensors = identity._base(model)
    kinds = {name.split(".")[-1] for name in tensors}
    codes = {"absmax_codes", "absmax_scale", "absmax_offset"} if double_quant else {"absmax"}
    assert {f"{kind} in blocks of 64" for kind in {"packed", "levels"} | codes} <= kinds
    for tensor in tensors.values():
        last = tensor.detach().reshape(-1).view(torch.uint8)[-1:]
        assert last.data_ptr() >= tensor.data_ptr()  # no copy
        last ^= 1
        seen.add(base_checksum(model))
        last ^= 1
    levels = sum(name.endswith("levels in blocks of 64") for name in tensors)
    assert len(seen) >= len(tensors) - levels and whole not in seen and base_checksum(model) == whole
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 1
    assert base_checksum(model) == whole


def test_a_buffer_that_is_stored_is_of_the_base_and_one_that_is_computed_is_not(tiny_llama):
    model = ql.add_lora(tiny_llama, r=2)
    before = base_checksum(model)
    model.model.rotary_emb.inv_freq.mul_(2)  # not stored; some families change theirs in mid-run
    assert base_checksum(model) == before
    model.register_buffer("bias", torch.zeros(2))
    assert base_checksum(model) != before


def test_the_checksum_does_not_depend_on_threads(tiny_llama, threads):
    """One tensor a thread, put together in the model's order: sha256sum's own values."""
    model = ql.add_lora(tiny_llama, r=2)
    lines = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            digest = hashlib.sha256(p.detach().numpy().tobytes()).hexdigest()
            lines.append(f"{name} {tuple(p.shape)} torch.float32 {digest}\n")
    assert base_checksum(model) == hashlib.sha256("".join(lines).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------- the arithmetic


def rewrite(run, change):
    """state.json of the newest checkpoint, changed as if it had been written so."""
    step = run / "checkpoints" / f"step-{saved_steps(run)[-1]:08}"
    facts = json.loads((step / "state.json").read_text())
    change(facts)
    (step / "state.json").write_text(json.dumps(facts))
    sums = (step / "SHA256SUMS").read_text().splitlines()
    digest = hashlib.sha256((step / "state.json").read_bytes()).hexdigest()
    lines = [f"{digest}  state.json" if line.endswith("  state.json") else line for line in sums]
    (step / "SHA256SUMS").write_text("\n".join(lines) + "\n")


@pytest.mark.long
@pytest.mark.parametrize(
    "name, value, said",
    [
        ("versions", {"torch": "2.0"}, r"versions\.torch: 2\.0 in the checkpoint, [\d.]+\S* now"),
        ("processor", "AVX2 of old", r"processor: AVX2 of old in the checkpoint, \S+ now"),
        ("kernels", "triton", r"kernels: triton in the checkpoint, \w+ now"),
        ("attention", "eager", r"attention: eager in the checkpoint, \w+ now"),
        ("float32_products", "medium", r"float32_products: medium in the checkpoint, highest now"),
        ("threads", 99_999, r"threads: 99999 in the checkpoint, 1 now"),
    ],
)
def test_other_arithmetic_is_told_in_one_line_with_what_accepts_it(folder, stopped, name, value, said):
    def change(facts):
        old = facts["arithmetic"][name]
        facts["arithmetic"][name] = old | value if isinstance(old, dict) else value

    rewrite(stopped, change)
    with pytest.raises(
        ValueError, match=f"with different arithmetic, .*: {said}. To resume anyway, pass other_arith"
    ) as error:
        resume(folder, stopped)
    assert "\n" not in str(error.value)
    assert resume(folder, stopped, other_arithmetic=True).ended == "all steps"
    assert json.loads((stopped / "settings.json").read_text())["arithmetic"][name] != value


@pytest.mark.long
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="it has one core")
def test_the_number_of_threads_is_taken_over_while_the_run_lasts(folder, stopped):
    rewrite(stopped, lambda facts: facts["arithmetic"].update(threads=2))
    with pytest.warns(UserWarning, match="began with 2 threads, so it continues with 2, not 1"):
        seen = {torch.get_num_threads() for _ in training(folder, stopped, resume=True)}
    assert seen == {2} and torch.get_num_threads() == 1


@pytest.mark.long
def test_the_outcome_of_the_race_is_recorded_and_taken_over(folder, tmp_path, outcome):
    for _ in (first := training(folder, tmp_path / "run")):
        first.stop()
    recorded = json.loads((tmp_path / "run" / "settings.json").read_text())["arithmetic"]
    assert product.Race(*recorded["race"]) == product.race() == product.Race.won_by(outcome)
    assert set(recorded["versions"]) == {"qlora-lab", "torch", "transformers", "numba"}
    for other in product.Race._fields:
        product.keep(product.Race.won_by(other))
    resume(folder, tmp_path / "run")
    assert product.race() == product.Race.won_by(outcome)


@pytest.mark.long
def test_a_checkpoint_without_the_arithmetic_is_refused(folder, stopped):
    rewrite(stopped, lambda facts: facts["arithmetic"].pop("versions"))
    with pytest.raises(ValueError, match="with different arithmetic, .*: versions: None in the checkpoint"):
        resume(folder, stopped)


def test_the_command_line_accepts_it_too():
    words = ["finetune", "--resume", "--other-arithmetic"]
    assert cli.build_parser().parse_args(words).other_arithmetic
    assert not cli.build_parser().parse_args(words[:1]).other_arithmetic


def test_a_clone_that_is_not_installed_can_train(tiny_llama, monkeypatch):
    """importlib.metadata raises an error for it; PYTHONPATH is enough for a run."""
    monkeypatch.setattr(identity, "VERSIONS", ("torch", "no-such-package"))
    assert arithmetic(tiny_llama)["versions"] == {"torch": torch.__version__, "no-such-package": None}


def test_what_is_recorded_is_json(tiny_llama):
    assert json.loads(json.dumps(arithmetic(tiny_llama))) == arithmetic(tiny_llama)
