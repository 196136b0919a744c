"""Looking at a model without changing it: what it costs, what passes through it, pictures of it.

It knows the model; neither training nor checkpoints. Pictures are drawn of plain arrays and of lines of metrics.jsonl.
"""
