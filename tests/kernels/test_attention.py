"""Attention in pairs of bf16 against float64, with torch's bf16 attention as the measure of what rounding costs."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from qlora_lab.kernels import attention, words

pytestmark = [
    pytest.mark.long,  # compiles for seconds
    pytest.mark.skipif(not words.has_pairs(), reason="needs AVX512-BF16"),
]

# batch, tokens, heads, kv_heads, head_dim: blocks of 8 and 64 queries and 32 keys that are full, partial, and alone
CAUSAL = [(2, 77, 4, 2, 32), (1, 64, 3, 3, 64), (1, 130, 2, 1, 96), (1, 2, 1, 1, 256)]


def drawn(batch, tokens, heads, kv_heads, head_dim, keys=None):
    g = torch.Generator().manual_seed(tokens)
    sizes = (tokens, heads), (keys or tokens, kv_heads), (keys or tokens, kv_heads), (tokens, heads)
    return [torch.randn(batch, n, many, head_dim, generator=g).bfloat16() for n, many in sizes]


def ours(q, k, values, grad, mask=None):
    scale = q.shape[3] ** -0.5
    out, kept = attention.forward(q, k, values, mask, scale)
    return out, *attention.backward(grad, (q, k, values, out, kept), mask, scale)


def theirs(q, k, values, grad, mask=None):
    inputs = [tensor.detach().requires_grad_() for tensor in (q, k, values)]
    turned = (tensor.transpose(1, 2) for tensor in inputs)
    options = {"is_causal": True} if mask is None else {"attn_mask": mask[:, None]}
    out = scaled_dot_product_attention(*turned, **options, enable_gqa=True).transpose(1, 2)
    out.backward(grad)
    return out.detach(), *(tensor.grad for tensor in inputs)


def assert_as_near_as_torch(inputs, mask=None):
    exact = theirs(*(tensor.double() for tensor in inputs), mask)
    for name, wanted, own, other in zip("oqkv", exact, ours(*inputs, mask), theirs(*inputs, mask), strict=True):
        error = (own.double() - wanted).norm() / wanted.norm()
        # Both round each factor of a product to 8 bits. 1.2: chance, in small cases.
        assert error < 1.2 * max((other.double() - wanted).norm() / wanted.norm(), 2.0**-9), f"{name}: {error:.2e}"


@pytest.mark.parametrize("case", CAUSAL, ids=str)
def test_each_query_sees_the_keys_up_to_its_own(case):
    assert_as_near_as_torch(drawn(*case))


def test_a_mask_says_what_is_seen():
    """Padding on the left, an example apart from its neighbour, and more keys than queries; one mask for all texts."""
    g = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 40, 40, dtype=torch.bool).tril()
    mask[1, 11:, :11] = False
    assert_as_near_as_torch(drawn(2, 40, 4, 2, 32), mask)
    some = torch.rand(1, 9, 70, generator=g) < 0.3
    some[:, :, 5] = True
    assert_as_near_as_torch(drawn(2, 9, 4, 2, 32, keys=70), some)


def test_a_query_that_sees_no_key_gives_zero_and_learns_nothing():
    mask = torch.ones(1, 20, 20, dtype=torch.bool).tril()
    mask[0, :, :6] = False  # the first six see nothing
    out, grad_q, grad_k, grad_v = ours(*drawn(1, 20, 2, 2, 32), mask)
    assert not out[0, :6].any() and not grad_q[0, :6].any()
    assert not grad_k[0, :6].any() and not grad_v[0, :6].any()  # seen by none
    assert all(tensor.isfinite().all() for tensor in (out, grad_q, grad_k, grad_v))


def test_large_scores_do_not_overflow():
    q, k, values, grad = drawn(1, 40, 1, 1, 32)
    assert_as_near_as_torch((q * 30, k * 30, values, grad))


def test_nan_stays_with_the_queries_that_see_it():
    q, k, values, grad = drawn(1, 40, 1, 1, 32)
    k[0, 33] = torch.nan
    out = ours(q, k, values, grad)[0]
    assert out[0, :33].isfinite().all() and out[0, 33:].isnan().all()


def test_bits_do_not_depend_on_threads(one_thread):
    inputs = drawn(2, 77, 4, 2, 32)
    alone = ours(*inputs)
    torch.set_num_threads(2)  # the fixture sets the number back
    assert all(map(torch.equal, alone, ours(*inputs)))
