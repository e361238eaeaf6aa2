"""Which examples make a step, and in which rows: none is lost, none is doubled, and no loss depends on it."""

import json

import pytest
import torch
from hypothesis import given, strategies as st

from qlora_lab.data.batches import Batches, collate_rows, to_rows
from qlora_lab.data.dataset import IGNORED, Encoded, encode
from qlora_lab.data.examples import Example
from qlora_lab.train.loss import answer_loss
from qlora_lab.train.rounding import tolerance

lengths_ = st.lists(st.integers(1, 30), min_size=1, max_size=40)


@pytest.mark.long
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32))
def test_an_epoch_holds_each_example_once(size, batch_size, seed):
    batches = Batches(size, batch_size, seed)
    for _ in range(2):
        epoch = [next(batches) for _ in range(-(-size // batch_size))]
        assert sorted(sum(epoch, [])) == list(range(size))
        assert all(len(batch) == batch_size for batch in epoch[:-1])


@pytest.mark.long
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 30))
def test_restored_batches_go_on_where_they_were(size, batch_size, steps):
    batches = Batches(size, batch_size, seed=7)
    for _ in range(steps):
        next(batches)
    resumed = Batches(size, batch_size, seed=0)
    resumed.restore(json.loads(json.dumps(batches.state())))
    assert [next(batches) for _ in range(9)] == [next(resumed) for _ in range(9)]


def test_epochs_and_seeds_shuffle_differently():
    first, other = Batches(100, 100, seed=0), Batches(100, 100, seed=1)
    assert next(first) != next(first)
    assert next(Batches(100, 100, seed=0)) != next(other)


def test_batches_refuse_nothing_and_another_data_set():
    with pytest.raises(ValueError, match="0 examples in batches of 8"):
        Batches(0, 8, seed=0)
    with pytest.raises(ValueError, match="saved with size=5, resumed with size=6"):
        Batches(6, 2, seed=0).restore(Batches(5, 2, seed=0).state())


@pytest.mark.long
@given(lengths_, st.integers(1, 12), st.integers(0, 9))
def test_grouped_by_length_an_epoch_holds_each_example_once(lengths, batch_size, seed):
    batches = Batches(len(lengths), batch_size, seed, lengths)
    for _ in range(2):
        epoch = [next(batches) for _ in range(-(-len(lengths) // batch_size))]
        assert sorted(sum(epoch, [])) == list(range(len(lengths)))
        assert all(len(batch) == batch_size for batch in epoch[:-1])


def test_grouped_batches_are_alike_inside_and_shuffled_outside():
    lengths = [7 * i % 400 for i in range(400)]  # each length once
    batches = Batches(400, 8, seed=0, lengths=lengths)
    epoch = [[lengths[i] for i in next(batches)] for _ in range(50)]
    assert all(max(batch) - min(batch) == 7 for batch in epoch)  # neighbours in length
    first = [batch[0] for batch in epoch]
    falls = sum(a > b for a, b in zip(first, first[1:], strict=False))
    assert 15 < falls < 35  # 49 in a saw; 24.5 in a shuffle, whose standard deviation is 2


def test_lengths_must_be_as_many_as_examples():
    with pytest.raises(ValueError, match="2 lengths for 3 examples: give one for each"):
        Batches(3, 1, seed=0, lengths=[1, 2])


@given(lengths_, st.integers(30, 60))
def test_rows_hold_each_example_once_within_their_capacity(lengths, capacity):
    examples = [Encoded([i] * length, [IGNORED] * length) for i, length in enumerate(lengths)]
    rows = to_rows(examples, capacity)
    assert sorted(one.input_ids[0] for row in rows for one in row) == list(range(len(lengths)))
    assert all(sum(len(one.input_ids) for one in row) <= capacity for row in rows)
    used = sorted(sum(len(one.input_ids) for one in row) for row in rows)
    assert len(rows) == 1 or used[0] + used[1] > capacity  # first-fit: no two rows would fit into one


EXAMPLES = [
    Example((("user", "1 and 1"), ("assistant", "two"))),
    Example((("user", "a longer question than that"), ("assistant", "yes"), ("user", "why?"), ("assistant", "so"))),
    Example((("user", "?"), ("assistant", "a long answer to a short question"))),
    Example((("user", "2"), ("assistant", "2"))),
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_changes_no_loss_and_no_gradient(tiny_llama, tokenizer, attention):
    """Were attention not kept inside each example, or positions not counted anew, the sums would differ."""
    tiny_llama.set_attn_implementation(attention)
    encoded = [encode(example, tokenizer) for example in EXAMPLES]
    rows = to_rows(encoded, capacity=max(len(one.input_ids) for one in encoded) + 25)
    assert 1 < len(rows) < len(encoded)
    results = []
    for batches in ([collate_rows(rows, 0)], [collate_rows([[one]], 0) for one in encoded]):
        tiny_llama.zero_grad()
        summed, count = map(sum, zip(*(answer_loss(tiny_llama, batch) for batch in batches), strict=True))
        summed.backward()
        results.append((summed.detach(), count, [p.grad.clone() for p in tiny_llama.parameters()]))
    (packed, n, grads), (alone, m, want) = results
    assert n == m
    torch.testing.assert_close(packed, alone)
    grads, want = (torch.cat([grad.flatten() for grad in some]) for some in (grads, want))
    assert (grads - want).norm() <= tolerance(tiny_llama) * want.norm()  # sums in another order


def test_packed_rows_need_the_positions(tiny_llama, tokenizer):
    """The equality above is no accident: with one mask for the whole row the loss is another."""
    encoded = [encode(example, tokenizer) for example in EXAMPLES]
    batch = collate_rows([encoded], 0)
    apart, _ = answer_loss(tiny_llama, batch)
    del batch["position_ids"]
    together, _ = answer_loss(tiny_llama, batch)
    assert abs(apart - together) > 0.01 * apart


def test_the_first_token_of_a_neighbour_is_no_label():
    first, second = Encoded([1, 2], [IGNORED, 2]), Encoded([3, 4], [3, 4])
    assert collate_rows([[first, second]], 0)["labels"].tolist() == [[IGNORED, 2, IGNORED, 4]]


def test_rows_of_one_example_keep_their_attention_mask(tokenizer):
    batch = collate_rows(to_rows([encode(example, tokenizer) for example in EXAMPLES]), 0)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
