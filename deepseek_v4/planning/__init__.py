"""What a run would be on a slice that is not there: its real train step through the TPU's own compiler, on any machine."""
