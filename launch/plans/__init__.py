"""Parts of `python -m launch.plan`: what kernels cost, the report, the search over meshes."""
