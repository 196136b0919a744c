"""Measurements behind `python -m launch.bench kernels`: what the TPU compiler makes of each op, without a TPU.
What may not live here: kernels, which are in `pallas_kernels`, and whole steps, which `launch.plan` compiles.

    cases.py     what is compiled: op x model x length x direction x side; build.py makes the programs
    compile.py   compiles a program in a process of its own
    schedule.py  reads the compiler's final bundles; program.py its HLO and the Pallas calls; sizes.py what arrays take
    plans.py     how often each region of a kernel runs
    bounds.py    the least work by the formula; chips.py what each chip can do
    rows.py      schedules times executions beside the bounds; run.py, report.py the rows, the table, the targets
"""
