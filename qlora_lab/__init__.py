"""qlora_lab: see how QLoRA works, down to the byte, then use it.

The names below are the whole public face. Each is loaded when it is first used, so that `import qlora_lab` is instant:
torch alone takes two seconds. The rooms, in the direction of the data: quant -> finetune -> measure -> show -> cli.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "codebook": "quant.codebook",
    "normal_float": "quant.codebook",
    "quantize": "quant.quantize",
    "dequantize": "quant.quantize",
    "QuantizedTensor": "quant.quantize",
    "to_tensors": "quant.serialize",
    "from_tensors": "quant.serialize",
    "fetch": "finetune.fetch",
    "load": "finetune.models",
    "quantize_folder": "finetune.quantized_folder",
    "diagnose": "finetune.doctor",
    "dtype_policy": "finetune.dtype_policy",
    "Linear4bit": "finetune.linear4bit",
    "quantize_linears": "finetune.linear4bit",
    "add_lora": "finetune.lora",
    "LoRALinear": "finetune.lora",
    "PagedAdamW": "finetune.paged_adamw",
    "load_data": "finetune.data",
    "Training": "finetune.trainer",
    "Settings": "finetune.settings",
    "save_adapter": "finetune.peft_format",
    "load_adapter": "finetune.peft_format",
    "generate": "measure.held_out",
    "held_out": "measure.held_out",
    "perplexity": "measure.perplexity",
    "topics_text": "measure.perplexity",
    "rouge_l": "measure.rouge",
    "code_use": "measure.code_use",
    "sweep": "measure.sweep",
    "read_results": "measure.results_file",
    "variants": "measure.sweep",
    "lloyd_max": "quant.lloyd_max",
    "Candidate": "quant.block_size",
    "best_plan": "quant.block_size",
    "load_plan": "quant.block_size",
    "sensitivity": "measure.sensitivity",
    "choices_of": "measure.sensitivity",
    "machine": "measure.machine",
    "predict_memory": "measure.memory",
    "measure_memory": "measure.measured_memory",
    "plan": "measure.memory_plan",
    "replay_published": "measure.published_memory",
    "show_labels": "finetune.data",
    "LabelView": "show.labels",
    "live": "show.live",
    "published_nf4": "measure.published",
    "published_data_types": "measure.published",
    "NormalFloatExplorer": "show.normal_float",
    "KernelMapExplorer": "show.kernel_map",
    "LowRankExplorer": "show.low_rank",
    "PageTableExplorer": "show.page_table",
    "ConstantsExplorer": "show.constants",
    "BlockSizeExplorer": "show.block_size",
    "MemoryExplorer": "show.memory",
    "OutlierExplorer": "show.data_types",
    "CodebookExplorer": "show.data_types",
    "check": "show.check",
    "picture": "show.figure",
    "show_source": "show.source",
}
_ROOMS = ("kernels", "quant", "finetune", "measure", "show", "cli")  # ql.finetune(model, ...): that room can be called
__all__ = sorted([*_HOME, "finetune"])
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"qlora_lab.{_HOME[name]}"), name)
        globals()[name] = value  # the next use does not come here
        return value
    if name in _ROOMS:
        return import_module(f"qlora_lab.{name}")
    raise AttributeError(f"qlora_lab has no {name!r}: its public names are {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
