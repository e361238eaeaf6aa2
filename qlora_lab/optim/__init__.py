"""The optim room: AdamW whose moments lie in pages, in a store that may be a file. Read it in this order:

stores -> paging -> adamw_8bit -> paged_adamw
"""
