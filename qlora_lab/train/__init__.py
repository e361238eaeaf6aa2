"""The train room: a model with adapters and tokens in, a trained adapter out. Read it in this order:

settings -> loss -> trainer -> checkpoint -> run_folder -> run_record
"""
