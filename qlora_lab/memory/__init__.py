"""The memory room: what a run costs in bytes, predicted, measured, and compared. Read it in this order:

shape -> activations -> ledger -> setup -> predict -> measured -> fit -> paging_trace
"""
