"""The memory room: the bytes that a run needs, predicted, measured and compared. Read it in this order:

shape -> activations -> ledger -> setup -> predict -> measured -> fit -> work -> paging_trace

answers.py has the cache of an answer.
"""
