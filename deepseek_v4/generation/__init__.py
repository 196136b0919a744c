"""From logits to text: sampling, decoding, speculation.

Nothing here learns: rollouts for learning are in `posttraining/`, and the cache itself is the model's (`model/cache.py`).
"""
