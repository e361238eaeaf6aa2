"""Check the files of a model folder: which weights there are, and whether each file is what its name says.

transformers reads most of these files itself, but its errors for a damaged one name no file, so they are checked first.
Links are followed, because the hub's cache consists of them; what an index names must lie in the folder.
"""

from os.path import lexists
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qlora_lab.files.strict_json import (
    LARGEST,
    NUMBER,
    OBJECT,
    TEXT,
    Rule,
    check_keys,
    check_regular,
    decoded,
    each,
    or_null,
    read_json,
    read_regular,
    whole,
)


class ModelError(RuntimeError):
    """A model cannot be fetched or read; the message says why and what to do."""


CONFIG = "config.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # how pictures become numbers; older, newer
INDEX = "model.safetensors.index.json"
# Limits above every published model, yet small enough to build on the meta device in seconds.
LAYERS = 1_000
WIDTH = 2**20
VOCABULARY = 2**24
SIZES = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "num_nextn_predict_layers"), LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "head_dim", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "n_inner", "ffn_dim", "d_ff", "dff"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads"), WIDTH),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts"), 2**14),
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("image_size", "patch_size"), 2**14),  # pixels
}
COPY = "put a whole copy in its place"
INDEX_MIB = 64  # the longest published has 13
TOKENIZER_MIB = 128  # the longest published has 33

NEEDED = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "hidden_size", "n_embd", "d_model", "vocab_size")
NEEDED += ("intermediate_size", "ffn_dim", "image_size", "patch_size")  # at least 1: with 0 there is no model
CONFIG_PARTS = ("text_config", "vision_config")  # configurations of their own, in that of a model that sees
DROPOUTS = ("hidden_dropout", "dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop")


def _list_or_one(rule: Rule) -> Rule:
    """Extend a rule to allow a list of such values, too, and null."""

    def allows(value: Any) -> bool:
        return all(map(rule.allows, value)) and len(value) <= LAYERS if isinstance(value, list) else rule.allows(value)

    return or_null(Rule(f"{rule.what}, or a list of at most {LAYERS:,} of them", allows))


IDS = _list_or_one(whole(-1, 2**31))
PROBABILITY = Rule("a number from 0 to 1", lambda value: NUMBER.allows(value) and 0 <= value <= 1)
ABOVE_0 = or_null(Rule("a number above 0", lambda value: NUMBER.allows(value) and value > 0))
ELSEWHERE = Rule("left out, because no file of another name is read", lambda value: False)
TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), IDS)  # an id, or a list of several end tokens
CONFIG_RULES = {
    "model_type": or_null(TEXT),
    "rope_theta": _list_or_one(ABOVE_0),
    "rope_parameters": or_null(OBJECT),
    **dict.fromkeys(CONFIG_PARTS, or_null(OBJECT)),
    "configuration_files": ELSEWHERE,
    **{name: _list_or_one(whole(int(name in NEEDED), most)) for name, most in SIZES.items()},
    **dict.fromkeys(DROPOUTS, or_null(PROBABILITY)),
    "attention_dropout": PROBABILITY,
    **TOKENS,
}
RULES = {  # file beside the weights -> rules of its keys
    "generation_config.json": TOKENS,
    "tokenizer_config.json": {"fast_tokenizer_files": ELSEWHERE, "model_max_length": or_null(NUMBER)},
}
# What tokenizers of transformers save and read under names of their own. A few are of one family: Marian has two
# SentencePiece models, and tekken.json is Mistral's.
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
TOKENIZER_FILES += ["chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"]
TOKENIZER_FILES += ["vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "sentencepiece.model", "spiece.model"]
TOKENIZER_FILES += ["sentencepiece.bpe.model", "spm.model", "spm_char.model", "source.spm", "target.spm"]
TOKENIZER_FILES += ["target_vocab.json", "vocab-src.json", "vocab-tgt.json", "entity_vocab.json", "byte_maps.json"]
TOKENIZER_FILES += ["word_shape.json", "word_pronunciation.json", "emoji.json", "normalizer.json", "dict.txt"]
TOKENIZER_FILES += ["bpe.codes", "prophetnet.tokenizer", "tekken.json"]
TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja")  # Jinja
TEXTS = ("merges.txt", "vocab.txt")
OBJECTS = {  # file -> bytes at most
    "generation_config.json": LARGEST,
    "special_tokens_map.json": LARGEST,
    "added_tokens.json": LARGEST,
    "tokenizer_config.json": LARGEST,
    **dict.fromkeys(PROCESSOR_FILES, LARGEST),
    "vocab.json": TOKENIZER_MIB * 2**20,
    "tokenizer.json": TOKENIZER_MIB * 2**20,
}


def check_folder(folder: Path) -> None:
    """Raise ModelError, ValueError or OSError, naming the file, unless a model can be loaded from `folder`.

    Opening a safetensors file proves its header and its length.
    """
    if not lexists(folder / CONFIG):
        raise FileNotFoundError(f"{folder} has no {CONFIG}: a model folder holds {CONFIG} and *.safetensors")
    try:
        read_config(folder / CONFIG)
        _check_small_files(folder)  # before transformers reads them
    except ValueError as error:
        raise ModelError(str(error)) from None
    for file in weight_files(folder):
        _check_weights(file)


def read_config(path: Path) -> dict:
    """Read a config.json. Raises ValueError, with the key, if it is not a configuration, or too large for one."""
    config = read_json(path, CONFIG_RULES, infinity=True)
    _check_rotary(config, str(path))
    for name in CONFIG_PARTS:
        if isinstance(part := config.get(name), dict):
            check_keys(part, CONFIG_RULES, f"{path}: {name}")
            _check_rotary(part, f"{path}: {name}")
    return config


def _check_rotary(config: dict, where: str) -> None:
    rotary = config.get("rope_parameters") or {}
    for part in (rotary, *rotary.values()):  # some families have an object for each kind of layer
        if isinstance(part, dict):
            check_keys(part, {"rope_theta": ABOVE_0}, f"{where}: rope_parameters")


def _check_small_files(folder: Path) -> None:
    """Raise ValueError for a damaged file beside the weights, if transformers would read it."""
    for name, largest in OBJECTS.items():
        if lexists(folder / name):
            read_json(folder / name, RULES.get(name), largest=largest)
    for name in TEXTS:
        if lexists(folder / name):
            decoded(read_regular(folder / name), str(folder / name))
    for template in (path for pattern in TEMPLATES for path in folder.glob(pattern)):
        _check_template(template)
    if lexists(folder / "tokenizer.model"):
        check_regular(folder / "tokenizer.model")


def _check_template(path: Path) -> None:
    """Raise ValueError for a chat template that is empty, or cut off in mid-block."""
    from jinja2 import Environment, TemplateSyntaxError
    from jinja2.ext import Extension

    class Generation(Extension):
        """The block that transformers adds to Jinja."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    text = decoded(read_regular(path), str(path))  # UTF-8, at most 16 MiB
    if not text.strip():
        raise ValueError(f"{path} is empty: put the template there, or remove the file")
    try:
        Environment(extensions=[Generation, "jinja2.ext.loopcontrols"]).parse(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno}: not a chat template, or cut off ({error})") from None
    except RecursionError:
        raise ValueError(f"{path} is not a chat template: it nests too deeply") from None


def weight_files(folder: Path) -> list[Path]:
    """Return a folder's safetensors files, chosen as transformers does: model.safetensors, or what the index names.

    Without either, model-*.safetensors; without these, any name but an adapter's.
    Raises FileNotFoundError for a folder without any, ValueError for an index that cannot be read, or that names a file
    elsewhere.
    """
    whole_file = folder / "model.safetensors"
    index = folder / INDEX
    if lexists(whole_file):  # a link to nothing, of a cache that lost a file, becomes an error that names it
        return [whole_file]
    if lexists(index):
        return [folder / name for name in _shards(index)]
    others = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("adapter_model"))
    if files := sorted(folder.glob("model-*.safetensors")) or others:
        return files
    raise FileNotFoundError(
        f"{folder} has no *.safetensors: other weight formats are not read; "
        "convert them once with transformers' save_pretrained(...)"
    )


def _shards(index: Path) -> list[str]:
    content = read_json(index, {"weight_map": each(TEXT)}, ("weight_map",), largest=INDEX_MIB * 2**20)
    names = sorted(set(content["weight_map"].values()))
    for name in names:
        if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r}: it must be a *.safetensors file beside the index")
    if not names:
        raise ValueError(f"{index} names no file: it must say where each tensor is")
    return names


def _check_weights(file: Path) -> None:
    if not file.exists():
        reason = "it is a link to nothing" if lexists(file) else f"{INDEX} names it"
        raise ValueError(f"{file} is missing, and {reason}: {COPY}")
    check_regular(file)
    with file.open("rb"):  # lets an error of the system through as it is, such as of permissions
        pass
    try:
        with safe_open(file, framework="numpy"):  # reads the header alone
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} is cut off, or not safetensors ({error}): {COPY}") from None
