"""The infer room: answers from packed weights. A model is read into a stack, and tokens go through it one by one.

step.py computes a token in plain torch; fast.py hands the same to one kernel. Read stack.py and step.py first.
chat.py is a conversation of such answers.
"""
