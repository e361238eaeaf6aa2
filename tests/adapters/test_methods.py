"""The methods beside LoRA: equal to PEFT or to the papers' equations, trained, saved, resumed, refused by name."""

import json
from copy import deepcopy

import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import qlora_lab as ql
from qlora_lab.adapters.adapter import Adapter, adapters, learned
from qlora_lab.adapters.add_adapter import METHODS, add_adapter
from qlora_lab.adapters.peft_format import load_adapter, save_adapter
from qlora_lab.data.examples import Example
from qlora_lab.doctor.checks import CHECKPOINTED
from qlora_lab.doctor.diagnose import diagnose
from qlora_lab.model.linear4bit import quantize_linears
from qlora_lab.train.settings import Settings
from qlora_lab.train.trainer import Training, finetune

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(3, 30)[None]
ON_LLAMA = [("houlsby", {"size": 4}), ("prefix", {"virtual_tokens": 5}), ("prefix", {"virtual_tokens": 5, "mlp": 8})]
ON_LLAMA += [("prompt", {"virtual_tokens": 5}), ("zero_bias", {})]
EXAMPLES = [Example((("user", f"{i} and {i}"), ("assistant", "two" if i % 2 else "too"))) for i in range(12)]


def disturbed(model):
    """The same model, with adapters that do something, as after training."""
    draws = torch.Generator().manual_seed(1)
    for parameter in learned(model).values():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=draws)
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture
def opt(tokenizer):
    """A model with biases, also in its norms."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=280, num_attention_heads=2, **shape)).eval()


# ----------------------------------------------------------------------------------------------- the equations


@pytest.mark.parametrize("bits", [16, 4])
def test_houlsby_is_the_papers_equation(tiny_llama, bits):
    base = quantize_linears(tiny_llama) if bits == 4 else tiny_llama
    plain = base.model.layers[0].self_attn.o_proj
    model = disturbed(add_adapter(base, "houlsby", size=4))
    layer = model.model.layers[0].self_attn.o_proj
    x = torch.randn(3, plain.in_features, generator=torch.Generator().manual_seed(2))
    h = plain(x)
    inner = h @ layer.down.T + layer.down_bias
    gelu = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
    torch.testing.assert_close(layer(x), h + gelu @ layer.up.T + layer.up_bias)


def test_houlsby_has_the_papers_size_and_starts_near_the_base(tiny_llama):
    before = logits(tiny_llama)
    model = add_adapter(tiny_llama, "houlsby", size=4)
    d = model.config.hidden_size
    assert {path.split(".")[-1] for path in adapters(model)} == {"o_proj", "down_proj"}
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == 2 * model.config.num_hidden_layers * (2 * 4 * d + d + 4)  # section 2.1: 2 m d + d + m
    assert 0 < (logits(model) - before).abs().max() < 1e-3 * before.abs().max()


def test_bitfit_changes_biases_and_nothing_else(opt):
    plain = deepcopy(opt)
    model = disturbed(add_adapter(opt, "bitfit"))
    changes = {path: layer.delta.data for path, layer in adapters(model).items()}
    for path, layer in plain.named_modules():
        if getattr(layer, "bias", None) is not None:
            layer.bias.data += changes.pop(path)
    assert not changes  # each belongs to a bias
    torch.testing.assert_close(logits(model), logits(plain))


def test_zero_biases_are_zero_and_come_to_each_linear_layer(tiny_llama):
    before = logits(tiny_llama)
    model = add_adapter(tiny_llama, "zero_bias")
    assert torch.equal(logits(model), before)
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {path.split(".")[-1] for path in adapters(model)} == names


def test_a_prompt_is_words_in_front(tiny_llama, tokenizer):
    """Learned vectors that are the embeddings of words act as those words."""
    words = tokenizer("ab ba", add_special_tokens=False)["input_ids"]
    want = logits(tiny_llama, torch.cat([torch.tensor([words]), IDS], dim=1))[:, len(words) :]
    model = add_adapter(tiny_llama, "prompt", virtual_tokens=len(words), start="ab ba", tokenizer=tokenizer)
    torch.testing.assert_close(logits(model), want)


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_text_is_repeated_or_cut(tiny_llama, tokenizer, tokens):
    words = tokenizer("ab ba", add_special_tokens=False)["input_ids"]
    model = add_adapter(tiny_llama, "prompt", virtual_tokens=tokens, start="ab ba", tokenizer=tokenizer)
    rows = tiny_llama.get_input_embeddings().weight[(words * 7)[:tokens]]
    assert torch.equal(model.soft_prompt.prompt, rows)


def test_a_prefix_of_activations_is_words_in_front(tiny_llama):
    """Keys and values of words act as those words: what the prefix starts from."""
    model = add_adapter(deepcopy(tiny_llama), "prefix", virtual_tokens=5, seed=3)
    ids = torch.randint(280, (5,), generator=torch.Generator().manual_seed(3))
    want = logits(tiny_llama, torch.cat([ids[None], IDS], dim=1))[:, 5:]
    torch.testing.assert_close(logits(model), want)


# ----------------------------------------------------------------------------------------------- PEFT


def with_peft(base, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.parametrize(("method", "options"), [case for case in ON_LLAMA if case[0] in ("prefix", "prompt")])
def test_peft_reads_it_with_the_same_logits(tmp_path, tiny_llama, method, options):
    plain = deepcopy(tiny_llama)
    before = logits(plain)
    ours = disturbed(add_adapter(tiny_llama, method, **options))
    theirs = with_peft(plain, save_adapter(ours, tmp_path / "adapter"))
    got = logits(theirs)[:, -IDS.shape[1] :]  # PEFT keeps the rows of a prompt
    torch.testing.assert_close(logits(ours), got, rtol=1e-5, atol=1e-5)
    assert (got - before).abs().max() > 0.01  # it is at work


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_what_peft_saves_is_read(tmp_path, tiny_llama, method):
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    kind = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}[method]
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=5)
    theirs = get_peft_model(deepcopy(tiny_llama), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(tiny_llama, tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), logits(theirs)[:, -IDS.shape[1] :], rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------- rows and answers


@pytest.mark.parametrize(("method", "options"), ON_LLAMA)
def test_padding_and_neighbours_change_no_row(tiny_llama, method, options):
    model = disturbed(add_adapter(tiny_llama, method, **options))
    alone = logits(model, IDS[:, :9])
    rows = torch.stack([torch.cat([torch.zeros(4, dtype=torch.long), IDS[0, :9]]), IDS[0, :13]])
    mask = torch.ones_like(rows)
    mask[0, :4] = 0  # padded on the left, as for answers
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = model(rows, attention_mask=mask, position_ids=positions).logits
    # the same sums in another order; 2^-16 of the largest logit is 128 roundings of float32
    torch.testing.assert_close(padded[:1, 4:], alone, rtol=0, atol=2**-16 * alone.abs().max().item())


@pytest.mark.parametrize(("method", "options"), ON_LLAMA)
def test_answers_with_a_cache_are_those_without(tiny_llama, method, options):
    model = disturbed(add_adapter(tiny_llama, method, **options))
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(IDS, use_cache=use, **how) for use in (True, False))
    assert torch.equal(cached, plain)
    assert cached.shape[1] > IDS.shape[1]


@pytest.mark.parametrize(("method", "options"), ON_LLAMA)
def test_beams_with_a_cache_are_those_without(tiny_llama, method, options):
    model = disturbed(add_adapter(tiny_llama, method, **options))
    how = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(IDS, use_cache=use, **how) for use in (True, False))
    assert torch.equal(cached, plain)
    assert not torch.equal(cached[0], cached[1])


FAMILIES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "gemma": (GemmaConfig, GemmaForCausalLM)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_in_other_families(tmp_path, family, method):
    """Words in front: Qwen2 shares keys among queries, Gemma scales its embeddings. And as PEFT reads them."""
    config, kind = FAMILIES[family]
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = kind(config(vocab_size=280, num_key_value_heads=2, head_dim=4, initializer_range=0.5, **shape)).eval()
    plain = deepcopy(model)
    words = torch.randint(280, (5,), generator=torch.Generator().manual_seed(3))
    longer = torch.cat([words[None], IDS], dim=1)
    want = logits(model, longer)[:, 5:]
    add_adapter(model, method, virtual_tokens=5, seed=3)
    torch.testing.assert_close(logits(model), want)
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    whole = torch.ones_like(longer)  # one of the words is the pad token
    beams = plain.generate(longer, attention_mask=whole, num_beams=3, **how)[:, 5:]
    assert torch.equal(model.generate(IDS, num_beams=3, **how), beams)
    disturbed(model)
    cached, again = (model.generate(IDS, use_cache=use, **how) for use in (True, False))
    rows = torch.cat([torch.zeros(1, 4, dtype=torch.long), IDS], dim=1)
    mask = (rows > 0).long()
    padded = model.generate(rows, attention_mask=mask, **how)
    assert torch.equal(cached, again) and torch.equal(padded[:, 4:], cached)
    theirs = with_peft(plain, save_adapter(model, tmp_path / "adapter"))
    got = logits(theirs)[:, -IDS.shape[1] :]
    torch.testing.assert_close(logits(model), got, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------- training and files


def train(model, tokenizer, folder, **options):
    options = {"data": EXAMPLES, "steps": 6, "batch_size": 4, "lr": 2e-2, "progress": False, **options}
    return finetune(model, tokenizer, out=folder, **options)


@pytest.mark.long
@pytest.mark.parametrize(("method", "options"), ON_LLAMA)
def test_it_learns_and_the_base_keeps_its_bits(tmp_path, tiny_llama, tokenizer, method, options):
    base = quantize_linears(tiny_llama)
    packed = {path: m.weight.packed.clone() for path, m in base.named_modules() if hasattr(m, "takes_adapter")}
    rest = {id(p): p.clone() for p in base.parameters()}
    model = add_adapter(base, method, **options)
    run = train(model, tokenizer, tmp_path / "run", steps=20)
    assert sum(run.losses[-5:]) < 0.99 * sum(run.losses[:5])  # a prefix of a model this small can do little
    assert all(torch.equal(p, rest[id(p)]) for p in model.parameters() if id(p) in rest)
    layers = [m for m in model.modules() if hasattr(m, "takes_adapter")]
    assert all(torch.equal(m.weight.packed, p) for m, p in zip(layers, packed.values(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "options"), ON_LLAMA)
def test_a_resumed_run_gives_the_same_bytes(tmp_path, tiny_llama, tokenizer, method, options):
    def model():
        return add_adapter(quantize_linears(deepcopy(tiny_llama)), method, **options)

    whole = train(model(), tokenizer, tmp_path / "whole", steps=7, save_every=3)
    stopped = Training(model(), tokenizer, EXAMPLES, tmp_path / "cut", whole.settings, progress=False)
    for line in stopped:
        if line["step"] == 3:
            stopped.stop()
    resumed = train(model(), tokenizer, tmp_path / "cut", steps=7, save_every=3, resume=True)
    assert resumed.losses == whole.losses
    files = [(run.adapter / "adapter_model.safetensors").read_bytes() for run in (whole, resumed)]
    assert files[0] == files[1]
    state = "checkpoints/step-00000006/state.safetensors"  # what learned, and the moments
    assert (tmp_path / "whole" / state).read_bytes() == (tmp_path / "cut" / state).read_bytes()


@pytest.mark.parametrize(("method", "options"), ON_LLAMA)
def test_it_goes_through_its_folder(tmp_path, tiny_llama, method, options):
    fresh, other = deepcopy(tiny_llama), deepcopy(tiny_llama)
    model = disturbed(add_adapter(tiny_llama, method, **options))
    folder = save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(load_adapter(fresh, folder)), logits(model))
    own = add_adapter(other, method, **{name: size for name, size in options.items() if name != "mlp"})
    assert torch.equal(logits(load_adapter(own, folder)), logits(model))
    again = save_adapter(own, tmp_path / "again")
    assert (again / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()


def test_biases_go_through_their_folder(tmp_path, opt):
    fresh = deepcopy(opt)
    model = disturbed(add_adapter(opt, "bitfit"))
    folder = save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(load_adapter(fresh, folder)), logits(model))


@pytest.mark.parametrize(("method", "options"), ON_LLAMA)
def test_a_cast_leaves_what_learns_in_float32(tiny_llama, method, options):
    model = disturbed(add_adapter(tiny_llama, method, **options))
    before = {name: p.detach().clone() for name, p in learned(model).items()}
    model.bfloat16()
    assert all(torch.equal(p, before[name]) for name, p in learned(model).items())
    assert logits(model).dtype == torch.bfloat16


# ----------------------------------------------------------------------------------------------- refusals


def test_every_method_stands_at_the_front_door(tiny_llama):
    relatives = ("rslora", "dora", "pissa", "loftq")
    others = ("full", "houlsby", "prefix", "prompt", "bitfit", "zero_bias")
    assert ("lora", *relatives, *others) == METHODS
    assert isinstance(next(iter(adapters(ql.add_adapter(tiny_llama, r=2)).values())).r, int)


REFUSED = {
    "unknown method": (("ia3", {}), "method is 'ia3', but it must be one of lora, rslora, dora, pissa, loftq, full"),
    "unknown option": (("houlsby", {"r": 4}), "houlsby has no option 'r': its options are size"),
    "no option at all": (("zero_bias", {"size": 4}), "zero_bias has no option 'size': its options are none"),
    "no size": (("houlsby", {"size": 0}), "size"),
    "half a token": (("prompt", {"virtual_tokens": 2.5}), "tokens"),
    "no tokens": (("prefix", {"virtual_tokens": 0}), "tokens"),
    "no MLP": (("prefix", {"mlp": 0}), "mlp"),
    "longer than the context": (
        ("prompt", {"virtual_tokens": 512}),
        "virtual_tokens is 512, but the model reads at most 512",
    ),
    "a prefix too long": (
        ("prefix", {"virtual_tokens": 600}),
        "virtual_tokens is 600, but the model reads at most 512",
    ),
    "a text without tokenizer": (("prompt", {"start": "a"}), "start needs the model's tokenizer"),
    "no biases": (("bitfit", {}), "LlamaForCausalLM has no biases to train: use zero_bias"),
    "a bad seed": (("houlsby", {"seed": -1}), "seed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_and_the_model_stays_as_it_was(tiny_llama, case):
    (method, options), message = REFUSED[case]
    tiny_llama.config.max_position_embeddings = 512
    flags = [p.requires_grad for p in tiny_llama.parameters()]
    modules = [type(module) for module in tiny_llama.modules()]
    with pytest.raises(ValueError, match=message):
        add_adapter(tiny_llama, method, **options)
    assert [p.requires_grad for p in tiny_llama.parameters()] == flags
    assert [type(module) for module in tiny_llama.modules()] == modules


def test_an_empty_text_is_refused(tiny_llama, tokenizer):
    with pytest.raises(ValueError, match="start has no token"):
        add_adapter(tiny_llama, "prompt", start="", tokenizer=tokenizer)


@pytest.mark.parametrize("method", METHODS)
def test_a_second_adapter_is_refused(tiny_llama, method):
    add_adapter(tiny_llama, "prompt", virtual_tokens=2)
    with pytest.raises(ValueError, match="has adapters already"):
        add_adapter(tiny_llama, method)


def test_zero_biases_are_refused_where_there_are_some(opt):
    with pytest.raises(ValueError, match="has biases: use bitfit"):
        add_adapter(opt, "zero_bias")


@pytest.mark.parametrize(
    ("config", "kind"), [(MixtralConfig, MixtralForCausalLM), (Qwen2MoeConfig, Qwen2MoeForCausalLM)]
)
def test_houlsby_refuses_experts(config, kind):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = kind(config(vocab_size=280, num_key_value_heads=2, **shape))
    with pytest.raises(ValueError, match="routes tokens to experts, so its feed-forward part has no single last"):
        add_adapter(model, "houlsby")
    assert not any(isinstance(module, Adapter) for module in model.modules())


def test_the_doctor_examines_a_prefix(tiny_llama, tokenizer):
    report = diagnose(add_adapter(tiny_llama, "prefix"), tokenizer, EXAMPLES, Settings(batch_size=2), progress=False)
    assert report.ok, str(report)
    (found,) = [finding for finding in report.findings if finding.name == CHECKPOINTED]
    assert found.message.startswith("leave it off: a prefix needs the keys and values")


def test_a_prefix_refuses_gradient_checkpointing(tmp_path, tiny_llama, tokenizer):
    model = add_adapter(tiny_llama, "prefix", virtual_tokens=2)
    with pytest.raises(ValueError, match="method prefix cannot checkpoint gradients"):
        train(model, tokenizer, tmp_path / "run", gradient_checkpointing=True)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_packed_rows_are_refused(tmp_path, tiny_llama, tokenizer, method):
    model = add_adapter(tiny_llama, method, virtual_tokens=2)
    with pytest.raises(ValueError, match="cannot train on packed rows"):
        train(model, tokenizer, tmp_path / "run", packing=True)


def test_an_adapter_of_another_method_is_refused(tmp_path, tiny_llama):
    folder = save_adapter(add_adapter(deepcopy(tiny_llama), "prompt", virtual_tokens=2), tmp_path / "prompt")
    for method, options in [("prefix", {"virtual_tokens": 2}), ("lora", {}), ("houlsby", {})]:
        model = add_adapter(deepcopy(tiny_llama), method, **options)
        with pytest.raises(ValueError, match=f"is of method prompt, but the model's own is {method}"):
            load_adapter(model, folder)
    lora = save_adapter(add_adapter(deepcopy(tiny_llama), r=2), tmp_path / "lora")
    with pytest.raises(ValueError, match="of method prompt"):
        load_adapter(add_adapter(tiny_llama, "prompt", virtual_tokens=2), lora)


def test_merging_is_refused_by_name(tmp_path, tiny_llama):
    with pytest.raises(ValueError, match="of method houlsby, but only LoRA"):
        ql.merge(add_adapter(tiny_llama, "houlsby"), tmp_path / "out", "dequantised", progress=False)


DAMAGED = {
    "another number of tokens": ({"num_virtual_tokens": 3}, "prompt_embeddings has shape"),
    "no number": ({"num_virtual_tokens": "2"}, "num_virtual_tokens of the adapter in"),
    "none": ({"num_virtual_tokens": None}, "num_virtual_tokens of the adapter in"),
    "the other method": ({"peft_type": "HOULSBY"}, "size of the adapter in"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_configuration_is_refused(tmp_path, tiny_llama, case):
    change, message = DAMAGED[case]
    folder = save_adapter(add_adapter(deepcopy(tiny_llama), "prompt", virtual_tokens=2), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    before = [type(module) for module in tiny_llama.modules()]
    with pytest.raises(ValueError, match=message):
        load_adapter(tiny_llama, folder)
    assert [type(module) for module in tiny_llama.modules()] == before


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_a_row_has_room_for_the_virtual_tokens(tmp_path, opt, tokenizer, method):
    """OPT stores a table of positions, so a row that is too long cannot be read at all."""
    longest = opt.model.decoder.embed_positions.num_embeddings - 2
    model = add_adapter(opt, method, virtual_tokens=longest - 5)
    with pytest.raises(ValueError, match=f"stores 5 positions, and {longest - 5} virtual tokens come first"):
        train(model, tokenizer, tmp_path / "run")


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_a_sliding_window_would_lose_virtual_tokens(method):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = MistralForCausalLM(MistralConfig(vocab_size=280, sliding_window=16, **shape))
    with pytest.raises(ValueError, match="MistralForCausalLM has a sliding window"):
        add_adapter(model, method, virtual_tokens=4)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_an_answer_does_not_continue_from_a_returned_cache(tiny_llama, method):
    model = add_adapter(tiny_llama, method, virtual_tokens=4)
    how = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    first = model.generate(IDS, max_new_tokens=5, return_dict_in_generate=True, **how)
    with pytest.raises(ValueError, match=f"{method} cannot continue from a cache that was returned"):
        model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=5, **how)
    with pytest.raises(ValueError, match="as a static cache makes: leave that out"):
        model.generate(IDS, max_new_tokens=5, cache_implementation="static", **how)


def test_a_prompt_shows_in_no_output(tiny_llama):
    plain = tiny_llama(IDS, output_hidden_states=True).hidden_states
    model = add_adapter(tiny_llama, "prompt", virtual_tokens=4)
    assert [s.shape for s in model(IDS, output_hidden_states=True).hidden_states] == [s.shape for s in plain]
    decoder = model.get_decoder()
    assert torch.equal(decoder(IDS, return_dict=False)[0], decoder(IDS).last_hidden_state)
