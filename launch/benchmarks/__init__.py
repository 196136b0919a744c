"""Measurements behind `python -m launch.bench`: ours beside others', on the same machine in the same minutes.
What may not live here: anything that makes ours faster, or the other side slower, than a user would have it.

    cases.py    what is measured, and with which settings each side runs
    flops.py    how much arithmetic a token needs, by the formula
    worker.py   one side of one case in a process of its own: prepare, run when told, report time and memory
    ours.py, theirs.py    what a worker of a side prepares
    run.py      starts workers, lets the sides take turns, shows progress
    start.py    how long the first results of a fresh process take
    report.py   rows, ratios, the table, the targets, the JSON file
"""
