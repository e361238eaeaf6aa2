"""Build the model of a folder's config.json without weights, and its tokenizer. No code of the folder is run.

The model lies on the meta device, where tensors have shapes but no bytes.

Buffers are computed as `from_pretrained` does it: every parameter is marked as having its value, and the model's own
`_init_weights` fills the rest. A buffer that it leaves alone is an error that names it.
"""

import re
from importlib.util import find_spec
from inspect import getmodule, getsource
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING

import torch

from qlora_lab.files.strict_json import SWITCH, TEXT, check_keys, whole
from qlora_lab.model.language_model import language_model
from qlora_lab.model.model_files import CONFIG, PROCESSOR_FILES, ModelError, read_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

NO_CODE = {"trust_remote_code": False}  # else transformers asks the user, and a yes runs the folder's code
NO_VALUE = "has no value: no file holds it and transformers does not compute it; please report this family"
WRONG_VALUES = AttributeError, LookupError, TypeError, ArithmeticError  # how transformers fails at bad values in a file
QUANTISED_RULES = {"plan": TEXT, "bnb_4bit_quant_type": TEXT, "block_size": whole(1)}
QUANTISED_RULES |= dict.fromkeys(("load_in_4bit", "load_in_8bit", "bnb_4bit_use_double_quant"), SWITCH)
DECODE_MXFP4 = (
    "save it decoded, with from_pretrained(..., quantization_config=Mxfp4Config(dequantize=True)) of transformers and "
    "save_pretrained, and load that"
)
UNKNOWN = "a \U0010fffd"  # a character that no vocabulary has
MOST_BUFFERS = 2**30  # bytes; a mask for 8,192 positions has 64 MiB
SWITCH_READ = re.compile(r"\bconfig\.is_decoder\b(?! =)")  # in the source of a family
VISION, SOUND = "vision_config", "audio_config"  # parts of a configuration: what reads images, and sound


def empty_model(folder: Path, dtype: torch.dtype) -> "PreTrainedModel":
    """Build the model of `folder` on the meta device. Raises ModelError for an unsupported family."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

    stored_options(folder)  # for its errors, which are clearer than transformers'
    config = _config(folder)  # no code of the folder is run
    for part in (config, *_parts(config)):
        _drop_pad_without_row(part)  # models with an added pad token
        # With `kernels` installed, transformers would fetch what a folder names here from the hub, and run it.
        part._attn_implementation = part._experts_implementation = None
        if hasattr(part, "quantization_config"):
            del part.quantization_config  # meant for transformers' own loader
    if getattr(config, SOUND, None):
        raise _unsupported(config, "it reads sound too: save its language model alone with transformers")
    try:
        with torch.device("meta"):  # shapes without bytes
            if getattr(config, VISION, None):
                model = AutoModelForImageTextToText.from_config(config, dtype=dtype, **NO_CODE)
            else:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, **NO_CODE)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error) and "custom code" not in str(error):
            raise
        raise _unsupported(
            config, "transformers has no causal language model of it: use one that AutoModelForCausalLM loads"
        ) from None
    except (*WRONG_VALUES, AssertionError, ImportError, RuntimeError) as error:
        raise _unusable(folder / "config.json", error) from None
    if (file := folder / "generation_config.json").exists():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except (*WRONG_VALUES, OSError, ValueError) as error:
            raise _unusable(file, error) from None
    _check_decoder(model)
    return model


def _parts(config: "PretrainedConfig") -> "list[PretrainedConfig]":
    """Return the configurations inside that of a model that sees: of its language model, and of its vision tower."""
    parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
    return [part for part in parts if hasattr(part, "model_type")]


def _check_decoder(model: "PreTrainedModel") -> None:
    """Raise ModelError for a model that is not a decoder, or whose decoder cannot be told from what sees."""
    config = model.config
    if getattr(config, VISION, None) and (config.is_encoder_decoder or not language_model(model)):
        raise _unsupported(config, "no decoder of its own stands beside what sees: choose one that is built like LLaVA")
    # BERT reads what comes after a token unless its configuration says is_decoder. GPT-NeoX has that switch, too, and
    # no code that asks for it; Bart's decoder switches it on itself.
    if getattr(config, "is_decoder", None) is False and SWITCH_READ.search(getsource(getmodule(type(model)))):
        raise _unsupported(config, "it is an encoder, whose tokens read the ones after them: choose a decoder")


def _unsupported(config: "PretrainedConfig", reason: str) -> ModelError:
    return ModelError(f"this family ({config.model_type}) is not supported, because {reason}")


def fields_of(folder: Path) -> dict:
    """Read config.json. Raises ModelError if it is not a configuration, or too large for one."""
    try:
        return read_config(folder / CONFIG)
    except ValueError as error:
        raise ModelError(str(error)) from None


def _unusable(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path} cannot be used: {type(error).__name__}: {' '.join(str(error).split())}")


def _drop_pad_without_row(config: "PretrainedConfig") -> None:
    """Drop a pad token that has no row in the embedding: transformers builds no model with it, and none needs it."""
    pad = getattr(config, "pad_token_id", None)
    rows = getattr(config, "vocab_size", None)
    if pad is not None and rows is not None and pad >= rows:
        config.pad_token_id = None


def _config(folder: Path) -> "PretrainedConfig":
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, **NO_CODE)
    except StrictDataclassError as error:
        raise ModelError(f"{folder}/config.json cannot be used: {' '.join(str(error).split())}") from None
    except WRONG_VALUES as error:
        raise _unusable(folder / "config.json", error) from None
    except ValueError as error:
        fields = fields_of(folder)
        family = f"this family ({fields.get('model_type', 'no model_type in config.json')})"
        if "AutoConfig" in fields.get("auto_map", {}):
            raise ModelError(
                f"{folder} brings code of its own, which is never run here, and transformers lacks {family}: "
                "convert it to one that transformers has"
            ) from None
        if "model_type" in fields and "does not recognize" not in str(error):
            raise
        raise ModelError(f"transformers does not know {family}: update it, or mend {folder}/config.json") from None


def stored_options(folder: Path) -> tuple[str, int, bool] | str | None:
    """Return (codebook, block size, double quantization) of a folder in 4 bits; None for an original.

    If layers differ, return a text that says so; each tensor then has its own options stored with it.
    Raises ModelError for a model that is quantised by anything else.
    """
    settings = fields_of(folder).get("quantization_config")
    if settings is None or settings == {}:
        return None
    if not isinstance(settings, dict):  # a text or a list, by hand
        raise ModelError(f"{folder}/config.json has quantization_config={short(settings)}: it must be a JSON object")
    method = settings.get("quant_method", "an unknown method")
    if method == "bitsandbytes" and settings.get("load_in_8bit"):
        raise ModelError(f"{folder} is in 8 bits by bitsandbytes, but only 4 bits are read: load its original")
    if method != "qlora_lab" and not (method == "bitsandbytes" and settings.get("load_in_4bit")):
        # GPT-OSS was published in MXFP4, so that is its original.
        advice = DECODE_MXFP4 if method == "mxfp4" else "load the original, to quantise it here"
        raise ModelError(f"{folder} holds a model quantised by {str(method):.60}: {advice}")
    try:
        check_keys(settings, QUANTISED_RULES, f"{folder / CONFIG}: quantization_config")
    except ValueError as error:
        raise ModelError(str(error)) from None
    if "plan" in settings:
        return f"mixed by its {settings['plan']}"
    return (
        settings.get("bnb_4bit_quant_type", "fp4"),  # bitsandbytes' own defaults
        settings.get("block_size", 64),
        settings.get("bnb_4bit_use_double_quant", False),
    )


def tokenizer_of(folder: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of `folder`; that of a model that sees has a `processor`, None in a folder without its files.

    Raises ModelError if either is unreadable, and for a tokenizer that needs its own code or sentencepiece.
    """
    tokenizer = _text_tokenizer(folder)
    if fields_of(folder).get(VISION):
        tokenizer.processor = processor_of(folder, tokenizer)
        # Older folders keep the template beside the processor, where a tokenizer does not look.
        tokenizer.chat_template = tokenizer.chat_template or getattr(tokenizer.processor, "chat_template", None)
    return tokenizer


def _text_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # tokenizer.json is the whole truth. AutoTokenizer rebuilds some classes from their parts and loses a rule: with
    # transformers 5.23 a GPT2Tokenizer folder no longer splits digits one by one, as SmolLM2 was trained to see them.
    if (folder / "tokenizer.json").exists():
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            tokenizer.encode(UNKNOWN)  # fail now, not in the middle of the user's data
            return tokenizer
        except Exception as error:  # the tokenizers library raises Exception itself
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ModelError(
                f"{_at_fault(folder)} cannot be read ({reason}): copy it again, or update tokenizers"
            ) from None
    try:
        return AutoTokenizer.from_pretrained(folder, **NO_CODE)
    except (ValueError, ImportError) as error:
        if "custom code" in str(error):
            raise ModelError(
                f"{folder} brings a tokenizer with code of its own, which is never run here: "
                "add the tokenizer.json of its family"
            ) from None
        readers = "sentencepiece", "google", "google.protobuf"  # in this order: finding a submodule imports its parent
        if (folder / "tokenizer.model").exists() and not all(map(find_spec, readers)):
            raise ModelError(
                f"{folder} has tokenizer.model and no tokenizer.json, and reading it takes sentencepiece and protobuf: "
                "install both with pip, or add the tokenizer.json"
            ) from None
        if not any((folder / name).exists() for name in ("tokenizer.model", "vocab.json", "vocab.txt")):
            raise ModelError(
                f"{folder} has no tokenizer.json: copy the tokenizer's files of this model there"
            ) from None
        raise


def processor_of(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> "ProcessorMixin | None":
    """Load the processor of `folder`, which turns pictures into numbers, around its tokenizer; None without its files.

    Raises ModelError for files that cannot be used, or that need code of their own.
    """
    from transformers import AutoProcessor

    files = [name for name in PROCESSOR_FILES if (folder / name).exists()]
    if not files:
        return None  # texts work without
    try:
        processor = AutoProcessor.from_pretrained(folder, **NO_CODE)
        processor.image_processor  # noqa: B018 - a tokenizer alone has none
    except (*WRONG_VALUES, OSError, ValueError, ImportError) as error:
        raise _unusable(folder / files[-1], error) from None
    processor.tokenizer = tokenizer  # read from tokenizer.json, see _text_tokenizer
    return processor


def _at_fault(folder: Path) -> str:
    """Return the file that transformers could not use, or those that it may have been."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(folder / "tokenizer.json")).encode(UNKNOWN)
    except Exception:  # as in tokenizer_of
        return str(folder / "tokenizer.json")
    names = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
    return f"{' or '.join(name for name in names if (folder / name).exists())} in {folder}"


def compute_buffers(model: "PreTrainedModel", device: torch.device) -> None:
    """Compute every buffer of an empty model. Raises ModelError if nothing computes one, or if they are too large."""
    size = sum(buffer.nbytes for buffer in model.buffers())  # on the meta device: a claim, not memory yet
    if size > MOST_BUFFERS:
        asked = f"{CONFIG} asks for buffers of {size / 2**30:,.1f} GiB, but at most {MOST_BUFFERS / 2**30:g} is allowed"
        raise ModelError(f"{asked}: correct the number of positions")
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # so that initialize_weights leaves it alone
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.full_like(buffer, _mark(buffer.dtype), device=device)
    model.initialize_weights()  # transformers' own, which now fills the buffers alone
    saved = model.state_dict().keys()  # these come from files
    for name, buffer in model.named_buffers():
        if name not in saved and buffer.numel() and _is_unset(buffer):
            raise ModelError(f"{name} {NO_VALUE}")


def _is_unset(buffer: torch.Tensor) -> bool:
    if buffer.dtype == torch.bool:
        return False
    mark = _mark(buffer.dtype)
    return bool((buffer.isnan() if mark != mark else buffer == mark).any())  # NaN alone differs from itself


def _mark(dtype: torch.dtype) -> float | int:
    """Return a value that no computation gives, to see whether a buffer is computed."""
    if dtype == torch.bool:  # both its values are used
        return False
    return torch.nan if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).min


def dtypes_of(model: "PreTrainedModel", dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype in which transformers keeps each tensor: some stay in float32 where the rest is narrower."""
    wide = set(model._keep_in_fp32_modules_strict or ())  # patterns of names
    if dtype == torch.float16:
        wide |= set(model._keep_in_fp32_modules or ())  # values beyond float16's 65,504
    pattern = "|".join(name.replace("*", ".*") for name in wide)
    return {
        name: torch.float32 if pattern and re.search(pattern, name) else empty.dtype
        for name, empty in model.state_dict().items()
    }
