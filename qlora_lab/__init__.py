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
    "fetch": "model.fetch",
    "load": "model.load",
    "quantize_folder": "model.quantized_folder",
    "diagnose": "doctor.diagnose",
    "dtype_policy": "doctor.dtype_policy",
    "Linear4bit": "model.linear4bit",
    "quantize_linears": "model.linear4bit",
    "add_lora": "adapters.lora",
    "LoRALinear": "adapters.lora",
    "PagedAdamW": "optim.paged_adamw",
    "load_data": "data.dataset",
    "finetune": "train.trainer",
    "Training": "train.trainer",
    "Settings": "train.settings",
    "save_adapter": "adapters.peft_format",
    "load_adapter": "adapters.peft_format",
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
    "Candidate": "quant.plan",
    "best_plan": "quant.plan",
    "load_plan": "quant.plan",
    "sensitivity": "measure.sensitivity",
    "choices_of": "measure.sensitivity",
    "machine": "measure.machine",
    "predict_memory": "memory.predict",
    "measure_memory": "memory.measured",
    "plan": "memory.fit",
    "replay_published": "memory.published",
    "show_labels": "data.dataset",
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
_ROOMS = [
    "files",
    "kernels",
    "quant",
    "data",
    "model",
    "adapters",
    "optim",
    "train",
    "doctor",
    "measure",
    "memory",
    "gpu_code",
    "show",
    "cli",
]
__all__ = sorted(_HOME)
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
