"""Float32 copies: bf16 weights are the rounded float32 ones of the same gradients, and state goes through a file."""

from functools import partial

import torch
from torch import nn

from qlora_lab.optim.master_copies import MASTER, MasterCopies
from qlora_lab.optim.paged_adamw import PagedAdamW


def made(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 5).to(dtype)), nn.Parameter(torch.randn(4))]


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)


def steps(optimizer, parameters, seeds):
    for seed in seeds:
        draws = torch.Generator().manual_seed(seed)
        for p in parameters:
            p.grad = torch.rand(p.shape, generator=draws).to(torch.bfloat16).to(p.dtype)
        optimizer.step()


def test_weights_are_the_rounded_ones_of_float32():
    weights = made()
    exact = [nn.Parameter(p.detach().float()) for p in weights]
    steps(adamw(exact), exact, range(50))
    start = [p.detach().clone() for p in weights]
    steps(MasterCopies(weights, adamw), weights, range(50))
    assert all(torch.equal(p, e.to(p.dtype)) for p, e in zip(weights, exact, strict=True))
    assert not torch.equal(weights[0], start[0])
    plain = made()
    steps(adamw(plain), plain, range(50))
    assert torch.equal(plain[0], start[0])  # each step alone is below half a unit in the last place


def test_a_learning_rate_that_changes_reaches_the_copies():
    weights, others = made(), made()
    optimizer = MasterCopies(weights, adamw)
    optimizer.param_groups[0]["lr"] = 0.1
    steps(optimizer, weights, [1])
    steps(torch.optim.AdamW(others, lr=0.1, weight_decay=0.0), others, [1])
    assert torch.equal(weights[1], others[1])


def test_the_state_holds_the_copies_and_continues_from_their_bits():
    weights = made()
    optimizer = MasterCopies(weights, adamw)
    steps(optimizer, weights, range(5))
    state = optimizer.state_dict()
    assert [MASTER in state["state"][number] for number in range(2)] == [True, False]  # the second is float32
    fresh = [nn.Parameter(p.detach().clone()) for p in weights]
    again = MasterCopies(fresh, adamw)
    again.load_state_dict({"state": {n: {k: v.clone() for k, v in s.items()} for n, s in state["state"].items()}})
    steps(optimizer, weights, range(5, 60))
    steps(again, fresh, range(5, 60))
    assert all(torch.equal(a, b) for a, b in zip(weights, fresh, strict=True))


def test_pages_are_prefetched_across_small_parameters():
    """A group has at most the 16 elements of the largest: three groups, each a page and a prefetched one."""
    weights = [nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for n in (8, 8, 16, 8, 8)]
    optimizer = MasterCopies(weights, partial(PagedAdamW, page_size=64, budget=128))  # 8 elements a page
    steps(optimizer, weights, range(2))
    pages = optimizer.inner.pages
    came = [(event.kind, event.page) for event in pages.events if event.kind in ("fault", "prefetch")][-6:]
    assert came == [(kind, page + second) for page in (0, 2, 4) for second, kind in enumerate(("fault", "prefetch"))]


def test_float32_gradients_are_there_for_one_group_at_a_time(monkeypatch):
    weights = [nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for n in (8, 8, 16, 8, 8)]
    optimizer = MasterCopies(weights, adamw)
    sizes = []
    count = lambda: sizes.append(sum(m.numel() for m in optimizer.masters if m.grad is not None))  # noqa: E731
    monkeypatch.setattr(optimizer.inner, "step", count)
    steps(optimizer, weights, [1])
    assert sizes == [16, 16, 16] and all(master.grad is None for master in optimizer.masters)


def test_a_weight_without_a_gradient_stays():
    weights = made()
    before = weights[0].detach().clone()
    weights[1].grad = torch.ones(4)
    MasterCopies(weights, adamw).step()
    assert torch.equal(weights[0], before)
