"""Measurements behind `python -m launch.bench memory`: what attention takes of a chip's HBM beside its operands and results.
What may not live here: memory of whole steps, which `launch.plan` says, and times.

    cases.py    what is compiled: kind of layer x side; build.py makes the programs, as the model calls the op
    run.py      compiles them for a mesh over a topology, and the table
"""
