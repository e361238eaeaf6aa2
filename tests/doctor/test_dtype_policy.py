"""The table counts what is there: every tensor once, logical elements, the bytes of real tensors."""

import json

import pytest
import torch

from qlora_lab.adapters.lora import adapters, add_lora
from qlora_lab.doctor.dtype_policy import dtype_policy
from qlora_lab.model.linear4bit import Linear4bit, quantize_linears
from qlora_lab.optim.paged_adamw import PagedAdamW
from tests.memory.test_mixtures import build

LINEARS = 2 * (4 * 16 * 16 + 3 * 16 * 32)  # weights of the two layers: q, k, v, o; gate, up, down
ADAPTED = 2 * (4 * 4 * (16 + 16) + 3 * 4 * (16 + 32))  # r = 4


@pytest.fixture
def model(tiny_llama):
    return add_lora(quantize_linears(tiny_llama.bfloat16()), r=4)


def row(policy, what):
    (found,) = [r for r in policy.rows if r.what == what]
    return found


def test_each_row(model):
    policy = dtype_policy(model)
    weights, embeddings, rest, head, adapted, gradients, moments = policy.rows
    packed = [m.weight for m in model.modules() if isinstance(m, Linear4bit)]
    assert (weights.what, weights.dtype) == ("base weights", "nf4, blocks of 64, double quantization")
    assert (weights.elements, weights.nbytes) == (LINEARS, sum(q.packed.nbytes + q.constants.nbytes for q in packed))
    assert weights.bits == 8 * weights.nbytes / LINEARS
    for one, what, n in ((embeddings, "embeddings", 280 * 16), (head, "head", 280 * 16)):
        assert (one.what, one.dtype, one.elements, one.nbytes) == (what, "bfloat16", n, 2 * n)
    assert rest.what == "norms, biases, buffers" and rest.elements >= 5 * 16
    assert (adapted.dtype, adapted.elements, adapted.nbytes) == ("float32", ADAPTED, 4 * ADAPTED)
    assert (gradients.dtype, gradients.elements, gradients.nbytes) == ("float32", ADAPTED, 4 * ADAPTED)
    assert (moments.dtype, moments.elements, moments.nbytes) == ("float32", 2 * ADAPTED, 8 * ADAPTED)
    assert policy.nbytes == sum(r.nbytes for r in policy.rows)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_experts_are_base_weights_and_routers_have_a_row(method):
    mixture = build("Mixtral", method)
    policy, experts = dtype_policy(mixture), 3 * 4 * 3 * 64 * 32  # layers, experts, gate and up and down
    assert row(policy, "base weights").elements == experts + 3 * 4 * 64 * 16
    assert row(policy, "routers").nbytes == 4 * 3 * 4 * 64
    assert row(policy, "norms, biases, buffers").elements < 1000


def test_bytes_are_those_of_all_tensors(model):
    """Counted another way: by storage."""
    storages = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    held = sum(storages.values())  # packed weights are buffers
    rows = [r for r in dtype_policy(model).rows if r.what not in ("gradients", "moments")]
    assert sum(r.nbytes for r in rows) == held


def test_gradients_are_those_that_a_step_makes(model):
    model(torch.arange(8)[None]).logits.sum().backward()
    made = [p.grad for p in model.parameters() if p.grad is not None]
    gradients = row(dtype_policy(model), "gradients")
    assert {p.dtype for p in made} == {torch.float32}
    assert (gradients.elements, gradients.nbytes) == (sum(g.numel() for g in made), sum(g.nbytes for g in made))


@pytest.mark.parametrize("bits, dtype", [(32, "float32"), (8, "8-bit codes, blocks of 256")])
def test_moments_are_those_of_the_optimizer(model, bits, dtype):
    optimizer = PagedAdamW([p for p in model.parameters() if p.requires_grad], bits=bits, page_size=5200)
    moments, pages = row(dtype_policy(model, bits), "moments"), optimizer.pages.frames.nbytes
    assert moments.dtype == dtype and pages - 5200 < moments.nbytes <= pages  # the last page need not be full


def test_shares_are_of_logical_elements(model):
    policy = dtype_policy(model)
    rest = sum(r.elements for r in policy.rows[1:4])
    assert (policy.trained, policy.weights) == (ADAPTED, LINEARS + rest + ADAPTED)
    assert policy.stored == LINEARS // 2 + rest + ADAPTED and policy.share == ADAPTED / policy.weights
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == policy.trained


def test_a_tied_head_counts_once(tiny_llama):
    tiny_llama.lm_head.weight = tiny_llama.model.embed_tokens.weight
    policy = dtype_policy(tiny_llama.requires_grad_(False))
    assert row(policy, "embeddings and head").elements == 280 * 16
    assert row(policy, "base weights").dtype == "float32" and policy.trained == 0


def test_weights_that_train_beside_the_adapters(model):
    model.model.embed_tokens.weight.requires_grad_(True)
    policy = dtype_policy(model)
    assert row(policy, "other trained weights").elements == 280 * 16 and policy.trained == ADAPTED + 280 * 16
    assert [(r.dtype, r.elements) for r in policy.rows if r.what == "gradients"] == [
        ("bfloat16", 280 * 16),
        ("float32", ADAPTED),
    ]


@pytest.mark.parametrize("dtype, scaled", [(torch.float32, False), (torch.bfloat16, False), (torch.float16, True)])
def test_only_float16_scales_its_loss(tiny_llama, dtype, scaled):
    policy = dtype_policy(add_lora(tiny_llama.to(dtype), r=2))
    assert (policy.computes_in, policy.loss, policy.loss_scaling) == (str(dtype)[6:], "float32", scaled)
    assert row(policy, "adapters").dtype == "float32"


def test_it_prints_as_a_table(model):
    lines = str(dtype_policy(model, optimizer_bits=8)).splitlines()
    assert lines[0].split() == ["what", "dtype", "elements", "bytes", "bits", "each"]
    assert lines[1].startswith("base weights") and f"{LINEARS:,}" in lines[1]
    assert len({len(line) for line in lines[:8]}) == 1 and max(map(len, lines)) <= 120
    assert lines[-2] == "computed in bfloat16; loss in float32, not scaled"
    assert lines[-1].startswith(f"trained: {ADAPTED:,} of ")


def test_it_is_plain_for_json(model):
    policy = dtype_policy(model)
    record = json.loads(json.dumps(policy.to_dict()))
    assert record["rows"][0]["elements"] == LINEARS and record["share"] == policy.share
    assert record["bytes"] == policy.nbytes and record["loss_scaling"] is False


def test_other_bits_are_refused(model):
    with pytest.raises(ValueError, match="optimizer_bits=16 is not allowed: moments have 32 or 8 bits"):
        dtype_policy(model, 16)


def test_merely_looking_changes_nothing(model):
    before = {n: p.clone() for n, p in model.state_dict().items()}
    dtype_policy(model)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and len(adapters(model)) == 14
