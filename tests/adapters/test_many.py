"""Many adapters over one base: a mixed batch gives each row its own answer, and nothing of a bank is lost."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

import qlora_lab as ql
from qlora_lab.adapters.adapter import adapters, learned
from qlora_lab.adapters.add_adapter import METHODS
from qlora_lab.adapters.many import AdapterBank, RowsLinear
from qlora_lab.adapters.peft_format import CONFIG, WEIGHTS
from qlora_lab.data.examples import Example
from qlora_lab.memory.predict import predict_memory
from qlora_lab.model.linear4bit import quantize_linears

pytestmark = pytest.mark.usefixtures("one_thread")

# Ranks, strengths and layers differ.
LORA = {
    "one": {"r": 2, "alpha": 4},
    "two": {"r": 5, "alpha": 1, "targets": ["q_proj", "down_proj"]},
    "three": {"r": 1, "targets": "v_proj"},
    "four": {"r": 3, "alpha": 7, "dropout": 0.5},
}
ROWS = ["three", "one", None, "two", "one", "four", None, "one"]
IDS = torch.randint(3, 280, (len(ROWS), 9), generator=torch.Generator().manual_seed(5))


def folder_of(base, folder, seed, method="lora", **options):
    """An adapter as after training: what it learned is not zero."""
    model = ql.add_adapter(deepcopy(base), method, **options)
    draws = torch.Generator().manual_seed(seed)
    for parameter in learned(model).values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=draws)
    return ql.save_adapter(model, folder)


@pytest.fixture(params=[16, 4])
def base(request, tiny_llama):
    return (quantize_linears(tiny_llama) if request.param == 4 else tiny_llama).eval()


@pytest.fixture(scope="module")
def kept():
    return {}


@pytest.fixture
def folders(tmp_path_factory, tiny_llama, kept):
    """name -> folder, written once: the model is the same in every test."""
    if not kept:
        folder = tmp_path_factory.mktemp("adapters")
        for seed, (name, options) in enumerate(LORA.items()):
            kept[name] = folder_of(tiny_llama, folder / name, seed, **options)
    return dict(kept)


@pytest.fixture
def bank(tiny_llama, folders):
    return filled(tiny_llama.eval(), folders)


def filled(model, folders):
    bank = AdapterBank(model)
    for name, folder in folders.items():
        bank.add(name, folder)
    return bank


def logits(model, ids=IDS, **more):
    with torch.no_grad():
        return model(ids, **more).logits


def singles(bank, names, **more):
    """Each row's own logits, with its own adapter in the whole model."""
    rows = []
    for row, name in enumerate(names):
        bank.use(name)
        rows.append(logits(bank.model, **more)[row])
    bank.use(None)
    return torch.stack(rows)


def assert_same_sums(got, want):
    """Float32 sums in another order: each errs by 2^-24 of its terms, and 15 layers of them by far less than 2^-16."""
    assert (got - want).abs().max() <= 2**-16 * want.abs().max()
    assert (got - want.roll(1, 0)).abs().max() > 0.01 * want.abs().max()  # another row's answer would be seen


# ----------------------------------------------------------------------------------------------- a mixed batch


@pytest.mark.filterwarnings("ignore:the adapter in")  # trained beside other weights
@pytest.mark.parametrize("names", [ROWS, ["four", "four", "one", "one"]])  # rows that move, and that lie in order
def test_each_row_of_a_mixed_batch_has_its_own_logits(base, folders, names):
    bank = filled(base, folders)
    ids = IDS[: len(names)]
    want = singles(bank, names, ids=ids)
    plain = logits(base, ids)
    with bank.rows(names):
        got = logits(base, ids)
    assert_same_sums(got, want)
    for row, name in enumerate(names):
        assert torch.equal(got[row], plain[row]) == (name is None)  # the base's own answer, bit for bit
    assert torch.equal(logits(base, ids), plain)  # and afterwards


def test_left_padding_changes_no_row(bank):
    mask = torch.ones_like(IDS)
    mask[::2, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    more = {"attention_mask": mask, "position_ids": positions}
    want = singles(bank, ROWS, **more)
    with bank.rows(ROWS):
        assert_same_sums(logits(bank.model, **more), want)


@pytest.mark.long
def test_answers_with_a_cache_are_those_of_single_runs(bank):
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = []
    for row, name in enumerate(ROWS):
        bank.use(name)
        want.append(bank.model.generate(IDS[row : row + 1], **how)[0])
    with bank.rows(ROWS):
        got = bank.model.generate(IDS, **how)
    assert torch.equal(got, torch.stack(want))
    assert len({tuple(row[-6:].tolist()) for row in got}) > 3  # they differ


@pytest.mark.slow
def test_in_bf16_a_layer_differs_by_its_roundings(outcome):
    """On the CPU a single adapter is added before the one rounding, a mixed batch rounds the base's product first.

    A rounding to bf16 moves a number by at most 2^-8 of it: the base's once, each result's once; float32 sums differ by
    far less, and 1 % is left for them.
    """
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(128, 96, bias=False)})
    layer = quantize_linears(model).layer
    names = ["a", "b", "c", None, "a"]
    made = {}
    for r, name in enumerate("abc", start=3):
        made[name] = ql.add_lora(nn.ModuleDict({"layer": layer}), r=r, alpha=8).layer
        made[name].lora_B.data.normal_(0, 0.1)
    x = torch.randn(len(names), 30, 128).bfloat16()
    got = RowsLinear(layer, made, names).eval()(x).float()
    plain = layer(x).float()
    for row, name in enumerate(names):
        single = made[name](x)[row].float() if name else plain[row]
        bound = 1.01 * 2**-8 * (plain[row].abs() + single.abs() + got[row].abs())
        assert ((got[row] - single).abs() <= bound).all()
        assert (single - plain[row]).abs().max() > 20 * bound.mean() or name is None  # the adapter is far above it


@pytest.mark.slow
def test_eight_adapters_over_smollm2_in_4_bits(tmp_path):
    """A mixed batch is as near to float32 as single runs are, but for its one more rounding per layer.

    So errors, which are roundings of the same size in every layer, at most double.
    """
    model, tokenizer = ql.load("smollm2-135m", progress=False, dtype=torch.bfloat16)
    model.eval()
    bank = AdapterBank(model)
    names = [f"adapter {i}" for i in range(8)]
    for seed, name in enumerate(names):
        ql.add_lora(model, r=4 + seed, seed=seed)
        draws = torch.Generator().manual_seed(seed)
        for adapter in adapters(model).values():
            adapter.lora_B.data.normal_(0, 0.05, generator=draws)
        folder = ql.save_adapter(model, tmp_path / name)
        ql.remove_adapter(model)
        bank.add(name, folder)
    ids = torch.tensor(tokenizer("The sum of two numbers is")["input_ids"])
    ids = ids.expand(8, -1)
    rounded = singles(bank, names, ids=ids).float()
    with bank.rows(names):
        mixed = logits(model, ids).float()
    model.float()  # exact: the same function without roundings
    want = singles(bank, names, ids=ids)
    with bank.rows(names):
        exact = logits(model, ids)
    assert (exact - want).abs().max() <= 2**-14 * want.abs().max()  # 2^-24 of each sum's terms, through 210 layers
    for row in range(8):
        errors = [(found[row] - want[row]).pow(2).mean().sqrt() for found in (mixed, rounded)]
        assert errors[0] <= 2 * errors[1]
        assert (mixed[row] - want).pow(2).mean((1, 2)).argmin() == row  # its own answer, and no other row's


@pytest.mark.long
def test_questions_are_routed_by_a_callable(bank, tokenizer):
    questions = ["ab", "the sum of the two numbers", "assistant", "b", "user"]
    by_length = {2: "one", 26: "two", 9: None, 1: "four", 4: "one"}

    def route(question):
        return by_length[len(question)]

    want = []
    for question in questions:
        bank.use(route(question))
        want.append(ql.generate(bank.model, tokenizer, question, 5, progress=False))
    got = ql.generate_routed(bank, tokenizer, questions, route, 5, progress=False)
    assert got == want
    assert bank.in_use == "one"  # as before
    with pytest.raises(ValueError, match="there is no adapter 'five': choose from 'one', 'two', 'three', 'four'"):
        ql.generate_routed(bank, tokenizer, questions, lambda question: "five")
    with pytest.raises(ValueError, match="questions is the text 'ab'"):
        ql.generate_routed(bank, tokenizer, "ab", route)


# ----------------------------------------------------------------------------------------------- names and files


def test_a_name_in_use_is_that_adapter_alone(tiny_llama, folders, bank):
    for name, folder in folders.items():
        own = ql.load_adapter(deepcopy(AdapterBank(tiny_llama).model), folder)
        bank.use(name)
        assert bank.in_use == name
        assert torch.equal(logits(bank.model), logits(own.eval()))
        bank.use(None)


def test_names_come_and_go(bank):
    plain = logits(bank.model)
    bank.use("two")
    bank.remove("one")
    assert bank.in_use == "two" and bank.names == ["two", "three", "four"]
    bank.remove("two")
    assert bank.in_use is None and torch.equal(logits(bank.model), plain)
    assert ql.add_lora(bank.model, r=1)  # an ordinary model again


def test_adding_leaves_the_adapter_in_use(bank, folders):
    bank.use("two")
    before = logits(bank.model)
    bank.add("five", folders["one"])
    with pytest.raises(FileNotFoundError):
        bank.add("six", folders["one"] / "nothing")
    assert bank.in_use == "two" and torch.equal(logits(bank.model), before)
    assert bank.names == [*LORA, "five"]


def test_each_goes_back_to_its_folder_bit_for_bit(tmp_path, bank, folders):
    with bank.rows(ROWS):
        logits(bank.model)
    bank.use("three")
    for name, folder in folders.items():
        again = bank.save(name, tmp_path / "again" / name)
        for file in (CONFIG, WEIGHTS):
            assert (again / file).read_bytes() == (folder / file).read_bytes()
    assert bank.in_use == "three"


def test_an_adapter_of_another_base_is_warned_of(tmp_path, tiny_llama):
    tiny_llama.name_or_path = "gpt9"
    folder = folder_of(tiny_llama, tmp_path / "adapter", 0, r=1)
    tiny_llama.name_or_path = "gpt8"
    bank = AdapterBank(tiny_llama)
    with pytest.warns(UserWarning, match="was trained on gpt9, but this model is gpt8"):
        bank.add("other", folder)


def test_a_bank_survives_a_cast(bank):
    """What is not in the model keeps its bits, and is used in the model's new dtype."""
    bank.use("one")
    bank.model.bfloat16()
    for name in LORA:
        bank.use(name)
        assert logits(bank.model).dtype == torch.bfloat16
        assert {p.dtype for p in learned(bank.model).values()} == {torch.float32}
    with bank.rows(ROWS):
        assert logits(bank.model).dtype == torch.bfloat16
        layer = bank.model.model.layers[0].self_attn.q_proj
        bank.model.float()
        assert layer.A.dtype == torch.float32 and logits(bank.model).dtype == torch.float32


def test_a_cast_of_the_base_reaches_the_lengths_of_dora(tmp_path, tiny_llama):
    """Also of one that is not in the model meanwhile: its weights have been rounded, and back."""
    bank = AdapterBank(tiny_llama)
    bank.add("dora", folder_of(tiny_llama, tmp_path / "dora", 1, "dora", r=2))
    tiny_llama.bfloat16().float()
    bank.use("dora")
    for layer in adapters(bank.model).values():
        assert torch.equal(layer.lengths, layer.base.weight.norm(dim=1))


# ----------------------------------------------------------------------------------------------- memory and training


@pytest.mark.slow
def test_a_hundred_adapters_take_what_the_ledger_says(tmp_path, tiny_llama):
    folder = folder_of(tiny_llama, tmp_path / "adapter", 0, r=3)
    bank = filled(tiny_llama, dict.fromkeys(map(str, range(100)), folder))
    ledger = predict_memory(tiny_llama.config, r=3)
    predicted = 100 * (ledger.row("lora_A").predicted + ledger.row("lora_B").predicted)
    storages = {}
    for name in bank.names:
        bank.use(name)
        for parameter in learned(bank.model).values():
            storage = parameter.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    assert sum(storages.values()) == bank.nbytes == predicted


def test_only_the_adapter_in_use_learns(tmp_path, bank, tokenizer, folders):
    bank.use("one")
    examples = [Example((("user", f"{i}"), ("assistant", "two"))) for i in range(6)]
    how = {"data": examples, "steps": 2, "batch_size": 2, "lr": 1e-2, "progress": False}
    ql.finetune(bank.model, tokenizer, out=tmp_path / "run", **how)
    for name, folder in folders.items():
        same = (bank.save(name, tmp_path / "after" / name) / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
        assert same == (name != "one")


def test_rows_cannot_learn(tmp_path, bank, tokenizer):
    with bank.rows(ROWS):
        bank.model.train()
        with pytest.raises(ValueError, match="cannot learn"):
            bank.model(IDS)
        with pytest.raises(ValueError, match="can only answer: leave"):
            ql.finetune(
                bank.model, tokenizer, out=tmp_path / "run", data=[Example((("user", "a"), ("assistant", "b")))]
            )


# ----------------------------------------------------------------------------------------------- refusals


REFUSED = {
    "a name twice": (lambda bank, folder: bank.add("one", folder), "the name 'one' is taken: remove"),
    "no name": (lambda bank, folder: bank.add("", folder), "name is ''"),
    "a number as name": (lambda bank, folder: bank.add(1, folder), "name is 1"),
    "an unknown name": (lambda bank, folder: bank.use("five"), "there is no adapter 'five': choose from 'one'"),
    "unknown, removed": (lambda bank, folder: bank.remove("five"), "there is no adapter 'five'"),
    "none, removed": (lambda bank, folder: bank.remove(None), "there is no adapter None"),
    "unknown, saved": (lambda bank, folder: bank.save("five", folder), "there is no adapter 'five'"),
    "a bank on a bank's model": (lambda bank, folder: AdapterBank(bank.model), "has adapters already"),
    "a second adapter": (lambda bank, folder: ql.add_lora(bank.model), "has adapters already"),
}


def test_refused_by_name(bank, folders):
    bank.use("two")
    for call, message in REFUSED.values():
        with pytest.raises(ValueError, match=message):
            call(bank, folders["one"])
        assert bank.in_use == "two" and bank.names == list(LORA)


NAMES = {
    "too few": (["one"], "1 rows have names, but the input is \\(8, 9, 16\\): give as many names as rows"),
    "none": ([], "give one name for each row"),
    "one text": ("one", "names is 'one': give one name for each row"),
    "unknown": (["one", "five"], "there is no adapter 'five'"),
    "numbers": ([0, 1], "there is no adapter 0: choose from 'one'"),
    "lists": ([["one"]], "there is no adapter \\['one'\\]"),
}


def test_names_of_rows_are_checked(bank):
    bank.use("two")
    for names, message in NAMES.values():
        with pytest.raises(ValueError, match=message), bank.rows(names):
            logits(bank.model)
        assert bank.in_use == "two"


def test_a_model_that_lays_its_rows_in_one_is_refused(tmp_path, tokenizer):
    """OPT's feed-forward part reads (rows x length, features): which row a token is of cannot be told there."""
    shape = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1}
    model = OPTForCausalLM(OPTConfig(vocab_size=280, num_attention_heads=2, **shape)).eval()
    bank = AdapterBank(model)
    bank.add("one", folder_of(model, tmp_path / "one", 1, r=2))
    lost = r"reads \(72, 16\), which has lost its rows: use one adapter at a time"
    with pytest.raises(ValueError, match=lost), bank.rows(["one"] * 8):
        logits(model)
    bank.use("one")
    assert logits(model).isfinite().all()


def test_inside_the_block_the_bank_is_left_alone(bank, folders):
    calls = [
        lambda: bank.use("one"),
        lambda: bank.add("five", folders["one"]),
        lambda: bank.remove("one"),
        lambda: bank.save("one", folders["one"]),
        lambda: ql.save_adapter(bank.model, folders["one"]),
        lambda: bank.rows(ROWS).__enter__(),
    ]
    with bank.rows(ROWS):
        for call in calls:
            with pytest.raises(ValueError, match=r"leave the `with bank.rows\(...\)` block first"):
                call()
        logits(bank.model)
    assert bank.names == list(LORA) and bank.in_use is None


def test_another_method_is_used_but_not_mixed(tmp_path, bank):
    plain = logits(bank.model)
    bank.add("soft", folder_of(bank.model, tmp_path / "soft", 1, "prompt", virtual_tokens=3))
    bank.use("soft")
    assert not torch.equal(logits(bank.model), plain)
    with pytest.raises(ValueError, match="'soft' is of method prompt, but rows can differ in LoRA's alone"):
        bank.check_rows(["one", "soft"])
    bank.use(None)
    assert torch.equal(logits(bank.model), plain)


def test_an_adapter_of_ones_own_is_not_thrown_away(bank):
    ql.add_lora(bank.model, r=1)
    for call in (lambda: bank.use("one"), lambda: bank.rows(ROWS).__enter__()):
        with pytest.raises(ValueError, match="has an adapter that is not the bank's"):
            call()
    assert len(adapters(bank.model)) == 14


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("bitfit", "full", "loftq")])
def test_a_removed_adapter_leaves_the_base(tiny_llama, method):
    plain = logits(tiny_llama)
    modules = [name for name, _ in tiny_llama.named_modules()]
    for _ in range(2):
        ql.add_adapter(tiny_llama, method)
        for parameter in learned(tiny_llama).values():
            parameter.data += 0.1
        assert not torch.equal(logits(tiny_llama), plain)
        ql.remove_adapter(tiny_llama)
        assert torch.equal(logits(tiny_llama), plain)
        assert [name for name, _ in tiny_llama.named_modules()] == modules
    assert not tiny_llama.get_decoder()._forward_hooks and not tiny_llama.get_decoder()._forward_pre_hooks
    with pytest.raises(ValueError, match="this model has no adapter"):
        ql.remove_adapter(tiny_llama)


def test_a_whole_model_is_no_adapter_of_a_bank(tmp_path, bank):
    plain = logits(bank.model)
    folder = ql.save_adapter(ql.add_adapter(deepcopy(bank.model), "full"), tmp_path / "full")
    with pytest.raises(ValueError, match="holds a whole model, not an adapter beside one"):
        bank.add("whole", folder)
    assert torch.equal(logits(bank.model), plain) and bank.names == list(LORA)
    with pytest.raises(ValueError, match="there is no base to go back to"):
        ql.remove_adapter(ql.add_adapter(bank.model, "full"))
