"""The gpu_code room: kernels compiled for cards that are not there, and what their machine code says.

Read it in this order: cards -> rungs -> aot -> machine_code -> roofline
"""
