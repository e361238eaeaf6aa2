"""The data room: what people bring becomes tokens and labels. Read it in this order:

records, fields, tool_calls -> examples, docstrings -> chat_template -> tokens -> labels -> dataset -> batches
"""
