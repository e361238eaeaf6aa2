"""GGUF to a Hugging Face folder: a tiny LLaMA goes through the format and must come back with the same logits."""

import json
import struct

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qlora_lab.model import gguf_in as gguf_convert
from qlora_lab.model.gguf_in import convert
from tools.fuzz import limited

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "ĠĠ Ġ", "Ġ t", "h e", "Ġt he", "1 2", "Ġ 1"]  # digits stand alone, so the last two must never fire
TOKENS = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    tie_word_embeddings=True,
)
Q4_1, F32 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.F32


def tiny_llama(config=CONFIG):
    """A random model whose weights are all on bfloat16's grid, large enough that attention is far from uniform."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((0.3 * torch.randn_like(parameter)).bfloat16())
    return model


def rotary_pairs(weight, n_heads):
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py: transformers' row order to GGUF's."""
    halves = weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, matrices=F32, *, without=(), **changes):
    """`model` as llama.cpp would write it; `matrices`: type of the projections; `without`, `changes`: damage."""
    config, writer = model.config, gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if "rope_scaling" in changes:
        writer.add_rope_scaling_type(changes["rope_scaling"])
    _add_tokenizer(writer, changes)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name in without or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        array = gguf_order(name, weight.numpy(), config)
        kind = matrices if "_proj" in name else F32
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(gguf_name, gguf.quantize(array, kind), raw_dtype=kind)
    if "extra" in changes:
        writer.add_tensor(changes["extra"], np.zeros(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_order(name, array, config):
    if "q_proj" in name:
        return rotary_pairs(array, config.num_attention_heads)
    return rotary_pairs(array, config.num_key_value_heads) if "k_proj" in name else array


def _add_tokenizer(writer, changes):
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([control if token in SPECIAL else normal for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    if "no_template" not in changes:
        writer.add_chat_template(TEMPLATE)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(12)[None]).logits


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def after_q4_1(model):
    """The model that a Q4_1 file holds: each row rounded in blocks of 32, then stored as bfloat16."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                rounded = gguf.dequantize(gguf.quantize(parameter.numpy(), Q4_1), Q4_1)
                parameter.copy_(torch.from_numpy(rounded).bfloat16())
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model, converted from a Q4_1 file."""
    root = tmp_path_factory.mktemp("gguf")
    convert(write_gguf(root / "tiny.gguf", tiny_llama(), Q4_1), root / "model", progress=False)
    return root / "model"


# ---------------------------------------------------------------------------------------------------------- weights


def test_float_file_gives_the_original_logits(tmp_path):
    convert(write_gguf(tmp_path / "tiny.gguf", tiny_llama()), tmp_path / "model", progress=False)
    assert torch.equal(logits(load(tmp_path / "model")), logits(tiny_llama()))


def test_q4_1_file_gives_the_logits_of_the_rounded_weights(folder):
    expected = logits(after_q4_1(tiny_llama()))
    assert torch.equal(logits(load(folder)), expected)
    assert not torch.equal(expected, logits(tiny_llama()))


def test_logits_would_show_a_wrong_row_order(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_convert, "neighbours_to_halves", lambda weight, n_heads: weight)
    convert(write_gguf(tmp_path / "tiny.gguf", tiny_llama()), tmp_path / "model", progress=False)
    assert (logits(load(tmp_path / "model")) - logits(tiny_llama())).abs().max() > 0.1


@pytest.mark.parametrize(("n_heads", "head_dim"), [(1, 2), (3, 4), (9, 64)])
def test_row_order_undoes_llama_cpp(n_heads, head_dim):
    weight = np.arange(n_heads * head_dim * 3).reshape(-1, 3)
    assert np.array_equal(gguf_convert.neighbours_to_halves(rotary_pairs(weight, n_heads), n_heads), weight)


def test_transformers_reads_the_same_weights_from_the_gguf_file(folder):
    witness = LlamaForCausalLM.from_pretrained(folder.parent, gguf_file="tiny.gguf", dtype=torch.float32).state_dict()
    for name, weight in load_file(folder / "model.safetensors").items():
        assert torch.equal(weight, witness[name].bfloat16()), name


def test_tied_embeddings_are_stored_once(folder):
    stored = load_file(folder / "model.safetensors")
    model = load(folder)
    assert "lm_head.weight" not in stored
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}


def test_untied_output_matrix_is_kept(tmp_path):
    config = LlamaConfig(**CONFIG.to_dict() | {"tie_word_embeddings": False})
    convert(write_gguf(tmp_path / "tiny.gguf", tiny_llama(config)), tmp_path / "model", progress=False)
    assert "lm_head.weight" in load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(logits(load(tmp_path / "model")), logits(tiny_llama(config)))


def test_weights_are_as_readable_as_the_other_files(folder):
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


# ---------------------------------------------------------------------------------------------------- configuration


def test_config_holds_what_the_file_said(folder):
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, LlamaConfig)
    shape = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    rest = ["num_key_value_heads", "head_dim", "max_position_embeddings", "rope_parameters", "tie_word_embeddings"]
    for field in shape + rest:
        assert getattr(config, field) == getattr(CONFIG, field), field
    assert config.rms_norm_eps == 1e-5  # exactly, though the file holds float32
    assert config.dtype == torch.bfloat16
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)


def test_generation_stops_at_the_end_token(folder):
    written = json.loads((folder / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


# -------------------------------------------------------------------------------------------------------- tokenizer

TEXTS = {
    "english": "The cat, the hat; they're Tom's.",
    "code": "def f(x):\n\treturn x[12:345] ** 2  # done\n",
    "digits": "2024 1,000.5 ½ ² Ⅷ ٣",
    "whitespace": "  a \n\n  b\t\tc   ",
    "unicode": "Größe 你好 мир שלום 👩\u200d💻 ❤\ufe0f é",
    "special inside": "<|im_start|>user\nhi<|im_end|>",
    "empty": "",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_text_survives_a_round_trip(folder, text):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("the the", ["t", "he", "Ġthe"]),
        ("12 112", ["1", "2", "Ġ", "1", "1", "2"]),  # neither "12" nor "Ġ1", although both are tokens
        ("x   5", ["x", "ĠĠĠ", "5"]),  # without the digits' rule: "ĠĠ", "Ġ", "5"
        ("x   t", ["x", "ĠĠ", "Ġt"]),  # a letter takes the last space
    ],
)
def test_splits_like_smollm2(folder, text, tokens):
    assert AutoTokenizer.from_pretrained(folder).tokenize(text) == tokens
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).tokens == tokens


def test_special_tokens_are_single_ids_with_their_roles(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [tokenizer(token).input_ids for token in SPECIAL] == [[0], [1], [2]]
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == [1, 2, 2]
    assert tokenizer.decode([1, 2], skip_special_tokens=True) == ""
    assert len(tokenizer) == len(TOKENS)


def test_chat_template_comes_from_the_file(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"


# ------------------------------------------------------------------------------------------------------- bad input


def gguf_header(key_type, value):
    """A file with one key, "k", and no tensors."""
    return b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", key_type) + value


NESTED = struct.pack("<IQ", 9, 1) * 5000  # an array of one array, and so on


@pytest.mark.parametrize("value", [struct.pack("<IQ", 4, 2**62), struct.pack("<IQ", 8, 2**62), NESTED])
def test_an_array_that_is_longer_than_its_file_or_endlessly_nested_is_refused_at_once(tmp_path, value):
    """gguf's own reader goes on for as many elements as the file claims."""
    path = tmp_path / "endless.gguf"
    path.write_bytes(gguf_header(9, value))
    with limited(5), pytest.raises(ValueError, match=r"endless\.gguf is not a readable GGUF file"):
        convert(path, tmp_path / "model", progress=False)


@pytest.mark.parametrize("keep", [0, 3, 20, 100, 1000, 5000, 20000, -1])
def test_truncated_file_is_named(tmp_path, keep):
    whole = write_gguf(tmp_path / "tiny.gguf", tiny_llama()).read_bytes()
    short = tmp_path / "short.gguf"
    short.write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=r"short\.gguf is not a readable GGUF file.*fetch it again"):
        convert(short, tmp_path / "model", progress=False)
    assert not (tmp_path / "model").exists()


def test_foreign_file_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("This is no model at all, however long it may be. " * 100)
    with pytest.raises(ValueError, match=r"notes\.txt is not a readable GGUF file"):
        convert(tmp_path / "notes.txt", tmp_path / "model", progress=False)


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"without": [Q_PROJ]}, f"lacks 1 tensors, {Q_PROJ} first"),
        ({"extra": "rope_freqs.weight"}, "'rope_freqs.weight' has no place in a plain LLaMA; use the original"),
        ({"extra": "blk.0.attn_q.bias"}, "'blk.0.attn_q.bias' has no place"),
        ({"architecture": "qwen2"}, "architecture is 'qwen2'; only 'llama' is read"),
        ({"pre": "llama-bpe"}, r"tokenizer is \('gpt2', 'llama-bpe'\); only \('gpt2', 'smollm'\)"),
        ({"rope_scaling": gguf.RopeScalingType.YARN}, "rope scaling .* is not read here; use the original"),
        ({"no_template": True}, "metadata lacks 'tokenizer.chat_template'"),
    ],
    ids=["missing tensor", "extra tensor", "bias", "architecture", "pre-tokenizer", "rope scaling", "no template"],
)
def test_what_cannot_be_converted_is_named(tmp_path, damage, message):
    path = write_gguf(tmp_path / "odd.gguf", tiny_llama(), **damage)
    with pytest.raises(ValueError, match=r"odd\.gguf cannot be converted: .*" + message):
        convert(path, tmp_path / "model", progress=False)
    assert not (tmp_path / "model").exists()


DAMAGED = [
    ({"llama.block_count": 10**6}, "it has 20 tensors for 1000000 layers"),  # a name for each would take long
    ({"llama.block_count": 2.0}, "llama.block_count is 2.0, but must be a whole number from 1 to 2,147,483,647"),
    ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0, but must be a whole number"),
    ({"llama.attention.head_count_kv": "2"}, "llama.attention.head_count_kv is '2', but must be a whole number"),
    ({"tokenizer.ggml.bos_token_id": 0.5}, "tokenizer.ggml.bos_token_id is 0.5, but must be a whole number"),
    ({"tokenizer.ggml.eos_token_id": len(TOKENS)}, f"eos_token_id is {len(TOKENS)}, but must be a whole number"),
    ({"tokenizer.ggml.unknown_token_id": -1}, "tokenizer.ggml.unknown_token_id is -1, but must be a whole number"),
    ({"tokenizer.chat_template": 3}, "tokenizer.chat_template is 3, but must be text"),
    ({"tokenizer.ggml.tokens": [3] * len(TOKENS)}, "some of its tokens or merges are not text"),
    ({"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base is nan, but must be a finite float above 0"),
    ({"llama.rope.freq_base": 10000}, "llama.rope.freq_base is 10000, but must be a finite float above 0"),
]


@pytest.mark.parametrize(
    "damage, message", DAMAGED, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_metadata_of_another_type_or_range_is_named(tmp_path, monkeypatch, damage, message):
    path, contents = write_gguf(tmp_path / "odd.gguf", tiny_llama()), gguf.ReaderField.contents
    monkeypatch.setattr(gguf.ReaderField, "contents", lambda field: damage.get(field.name, contents(field)))
    with pytest.raises(ValueError) as error:
        convert(path, tmp_path / "model", progress=False)
    assert str(error.value).startswith(f"{path} cannot be converted: ") and message in str(error.value)
    assert not (tmp_path / "model").exists()
