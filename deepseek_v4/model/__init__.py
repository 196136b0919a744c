"""The network as pure functions of its variables, a concept of the report a file; `transformer.py` puts it together.

No optimizer, no data, no files, no names of other people's tensors: those are in `optim/`, `training/` and `checkpoint/`.
What deserves a kernel is called in `pallas_kernels`; where arrays lie is said by meaning, and `sharding.py` knows the mesh.
"""
