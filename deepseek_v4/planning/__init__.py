"""What a run would be on a slice that is not there: its real train step through the TPU's own compiler, on any machine.

It builds nothing of its own: the step is that of `training/`, the sizes are those of the run.
Nothing is run or allocated here.
"""
