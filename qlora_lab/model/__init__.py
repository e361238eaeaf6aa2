"""The model room: a name or a folder becomes a model with linear layers in 4 bits. Read it in this order:

fetch -> gguf_in -> model_files -> empty_model -> linear4bit -> stored -> load -> quantized_folder
"""
