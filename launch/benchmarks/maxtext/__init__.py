"""V4-Flash's whole train step beside MaxText's, both compiled by one libtpu file for the same slice, nothing run.
What may not live here: anything of ours that MaxText's process would import, and anything of MaxText's that ours would.

    cases.py     slices, batches and optimizers, and what each side must be told for them
    theirs.py    a process of MaxText's own environment: compiles its step; XLA writes the program down
    ours.py      the same of our step
    read.py      both texts read alike: FLOPs, bytes that travel, memory
    run.py       starts the processes, ratios, table, targets
"""
