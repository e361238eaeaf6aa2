"""The train room: a model with adapters and tokens in, a trained adapter out. Read it in this order:

settings -> loss -> loop (all of it on one screen) -> trainer -> run_state -> checkpoint -> run_folder -> run_record
"""
