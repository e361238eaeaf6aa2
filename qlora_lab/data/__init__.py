"""The data room: what people bring becomes tokens and labels. Read it in this order:

examples, docstrings -> fields -> chat_template -> tokens -> labels -> dataset -> batches
"""
