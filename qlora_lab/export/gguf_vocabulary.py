"""The tokenizer of a model, as GGUF stores it: tokens, merges, special ids, the chat template, and a name.

In: a folder with tokenizer.json, BPE over bytes. Out: the keys tokenizer.* of a GGUFWriter.
GGUF does not hold the rule by which a text is split before merging: llama.cpp has a list of rules, and the file names
one of them. A wrong name gives fluent nonsense, so a rule is identified by the whole text of tokenizer.json's, and
refused where that is unknown. Source: the list in llama.cpp's llama-vocab.cpp, with regular expressions.
But: Qwen's normalisation (NFC) is left out, as by llama.cpp's own converter: no program applies it to GGUF.

Not here: SentencePiece and WordPiece.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
from gguf import TokenType

from qlora_lab.files.strict_json import parse
from qlora_lab.model.empty_model import tokenizer_of
from qlora_lab.model.model_files import TOKENIZER_MIB

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

FEWER_ENDS = "take some out of generation_config.json"
REFUSED = "is not written as GGUF, because llama.cpp has no such rule"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
GPT2 = BYTES | {"use_regex": True}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"  # with a contraction, or one sign before
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, BYTES]}


DIGITS = {"type": "Digits", "individual_digits": True}
# Name of llama.cpp -> (rule, whether a word that is a token is taken whole, normalisation)
# Digits: Llama 3 takes three together, smollm and Qwen one, GPT-2 all of a number.
RULES = {
    "gpt-2": (GPT2, False, None),
    "smollm": ({"type": "Sequence", "pretokenizers": [DIGITS, GPT2]}, False, None),
    "llama-bpe": (_split(WORDS + r"\p{N}{1,3}" + REST), True, None),
    "qwen2": (_split(WORDS + r"\p{N}" + REST), False, "NFC"),
}


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, model: "PreTrainedModel") -> None:
    """Add the tokenizer of `folder`. Raises ValueError, naming it, for one that llama.cpp would read differently."""
    tokenizer = tokenizer_of(folder)
    file = _read(folder)
    pre = rule_of(file)
    tokens, types = _tokens(file, model.config.vocab_size)
    # tokenizer_config.json may add tokens of its own, and make others special
    for number, added in tokenizer.added_tokens_decoder.items():
        if number >= len(tokens) or tokens[number] != str(added):
            raise ValueError(f"the token {str(added)!r} is in tokenizer_config.json, but not in tokenizer.json: add it")
        if added.special:
            types[number] = TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in file["model"]["merges"])
    writer.add_token_merges(list(merges))
    _add_special(writer, tokenizer, model)
    if template := _template(tokenizer):
        writer.add_chat_template(template)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ValueError(f"{folder} has no tokenizer.json, so its tokenizer {REFUSED}")
    assert path.stat().st_size <= TOKENIZER_MIB * 2**20, "tokenizer_of has read it"
    return parse(path.read_text("utf-8"), str(path))


def rule_of(file: dict[str, Any]) -> str:
    """Return llama.cpp's name for the rule of a tokenizer.json. Raises ValueError for one that it does not have."""
    model = file["model"]
    kind = model.get("type", "BPE")
    if kind != "BPE" or model.get("byte_fallback"):
        name = "SentencePiece" if model.get("byte_fallback") else kind
        raise ValueError(f"this tokenizer ({name}) {REFUSED}: only BPE over bytes is")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(setting):
            raise ValueError(f"this tokenizer has {setting}={model[setting]!r}, which {REFUSED}")
    found = _plain(file.get("pre_tokenizer")), bool(model.get("ignore_merges")), _normalizer(file)
    for name, (rule, whole, normalizer) in RULES.items():
        if found[0] == rule and found[1] == whole and found[2] in (None, normalizer):
            return name
    said = json.dumps({"ignore_merges": found[1], "normalizer": found[2], "pre_tokenizer": found[0]})
    raise ValueError(f"this tokenizer splits texts by {said:.300}, which {REFUSED}: known are {', '.join(RULES)}")


def _plain(rule: Any) -> Any:
    """Leave out what says nothing about tokens."""
    if isinstance(rule, dict):
        return {key: _plain(value) for key, value in rule.items() if key != "trim_offsets"}
    return [_plain(part) for part in rule] if isinstance(rule, list) else rule


def _normalizer(file: dict[str, Any]) -> str | None:
    normalizer = file.get("normalizer")
    return normalizer and (normalizer["type"] if set(normalizer) == {"type"} else json.dumps(normalizer))


def _tokens(file: dict[str, Any], rows: int) -> tuple[list[str], list[TokenType]]:
    """Return the text and the type of each row of the embedding."""
    texts = {number: text for text, number in file["model"]["vocab"].items()}
    types = dict.fromkeys(texts, TokenType.NORMAL)
    for added in file.get("added_tokens", []):
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise ValueError(f"the token {added['content']!r} takes spaces beside it with it, which {REFUSED}")
        # llama.cpp looks for these in a text before it splits the rest.
        texts[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if max(texts) >= rows:
        raise ValueError(f"the tokenizer has token {max(texts):,}, but the model only {rows:,} rows: mend the folder")
    # Rows without a token, which round a vocabulary up, by llama.cpp's convention.
    numbers = range(rows)
    return [texts.get(n, f"[PAD{n}]") for n in numbers], [types.get(n, TokenType.UNUSED) for n in numbers]


def _add_special(writer: gguf.GGUFWriter, tokenizer: "Tokenizer", model: "PreTrainedModel") -> None:
    """Add the ids of special tokens, and which of them the tokenizer puts around a text."""
    ids = {name: _id(name, tokenizer, model.config) for name in ("bos", "eos", "pad", "unk")}
    for name, number in (ids | _other_ends(ids["eos"], model)).items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    # What the post-processor does is seen, not read: there are several ways to write the same.
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    around = tokenizer("a")["input_ids"]
    starts = around[:1] == [ids["bos"]] != bare[:1]
    ends = around[-1:] == [ids["eos"]] != bare[-1:]
    if around != [ids["bos"]] * starts + bare + [ids["eos"]] * ends:
        raise ValueError(f"this tokenizer makes {around} of the text 'a' {bare}, which {REFUSED}")
    writer.add_add_bos_token(starts)
    writer.add_add_eos_token(ends)


def _id(name: str, tokenizer: "Tokenizer", config: "PretrainedConfig") -> int | None:
    """Return the tokenizer's id of a special token, or else the first one that config.json names."""
    number = getattr(tokenizer, f"{name}_token_id")
    number = getattr(config, f"{name}_token_id", None) if number is None else number
    number = next(iter(number), None) if isinstance(number, list) else number
    return None if number is not None and number < 0 else number  # -1 says that there is none


def _other_ends(eos: int | None, model: "PreTrainedModel") -> dict[str, int]:
    """Return other tokens that end an answer, as the ends of a turn and of a message: llama.cpp stops at all three.

    Raises ValueError for more of them.
    """
    found = model.generation_config.eos_token_id
    found = found if isinstance(found, list) else [found]
    ends = (number for number in found if number is not None and number >= 0)  # -1 says that there is none
    others = [number for number in dict.fromkeys(ends) if number != eos]
    if len(others) > 2:
        named = ", ".join(str(number) for number in (eos, *others) if number is not None)
        raise ValueError(
            f"this model ends its answers at the tokens {named}, but GGUF holds two besides the tokenizer's own: "
            f"{FEWER_ENDS}"
        )
    return dict(zip(("eot", "eom"), others, strict=False))


def _template(tokenizer: "Tokenizer") -> str | list[dict[str, str]] | None:
    """Return the chat template, or a list of several with their names, as the writer takes it."""
    template = tokenizer.chat_template
    if not isinstance(template, dict):
        return template
    if "default" not in template:
        raise ValueError(f"this tokenizer has the chat templates {', '.join(template)}, but no default one: name it so")
    return [{"name": name, "template": text} for name, text in template.items()]
