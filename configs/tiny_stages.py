"""V4's way of training in small: dense rows that grow, the indexer's warm-up, then sparse attention on longer rows.

command   python -m launch.train --config configs/tiny_stages.py --workdir runs/tiny_stages
hardware  2 CPU cores
duration  TODO
result    TODO
"""
