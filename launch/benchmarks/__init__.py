"""Measurements behind `python -m launch.bench`: ours beside others', on the same machine in the same minutes.
What may not live here: anything that makes ours faster, or the other side slower, than a user would have it.

    cases.py    what is measured, and with which settings each side runs
    flops.py    how much arithmetic a token needs, by the formula
    worker.py   one side of one case in a process of its own: prepare, run when told, report time and memory
    ours.py, theirs.py    what a worker of a side prepares
    run.py      starts workers, lets the sides take turns, shows progress
    missing.py  what a row says that has no figures
    report.py   rows, ratios, the table, the targets, the JSON file, the line on top
    start.py    how long the first results of a fresh process take
    context.py, context_rows.py    a long context, chunk by chunk: runs; what its rows hold
    overlap.py  how much of its selection a query shares with its neighbours
    exchange.py what the compiler says of experts on several devices
    splash.py   JAX's splash attention as the other side of benches
    everything.py    all benches one after another
    tables.py   README's tables from the JSON files
    bench_config.json    the model
    kernels/, memory/    programs for a TPU that need not be there: kernels; attention's memory
    maxtext/    Flash's step beside MaxText's
"""
