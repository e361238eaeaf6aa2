"""The adapters room: what is trained beside the frozen weights, and the files that hold it.

Read it in this order:

targets, strength -> lora -> expert_lora -> parts -> peft_config -> peft_format, peft_parameters -> adapter_base,
model_tensors
"""
