"""The adapters room: what is trained beside the frozen weights, and the files that hold it.

Read it in this order: lora -> expert_lora -> peft_config -> peft_format -> adapter_base, model_tensors
"""
