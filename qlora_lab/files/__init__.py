"""The files room: what a command writes is whole or absent, and never replaces somebody's own files.

Read it in this order: disk -> out_path -> strict_json -> lock -> ownership -> replace -> checksums, tensor_file
"""
