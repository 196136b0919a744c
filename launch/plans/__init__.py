"""Parts of `python -m launch.plan`: what kernels cost, processes that compile, the report, the search over meshes.

What may not live here: how a step is compiled and its text read (`deepseek_v4/planning`), and anything that runs one.
"""
