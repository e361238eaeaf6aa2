"""The quant room: tensors in, tensors out. Read it in this order:

codebook -> blocks -> packing -> double_quant -> quantize -> serialize -> stack
"""
