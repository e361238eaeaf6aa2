"""The exercises room: what a reader does in a lesson, and how the library answers.

guess.py  a question before a measurement: `guess`
check.py  a student's answer -> "correct" or a hint: `check`
hints.py  what to say to the likely mistakes of each exercise; hints_packing.py has those of notebook 02,
          hints_methods.py those of notebook 11, hints_results.py those of notebook 12, hints_merging.py those of
          notebook 13
verdicts.py, needed.py -> submission.py -> grade.py: a student's notebook -> which of its exercises pass
"""
