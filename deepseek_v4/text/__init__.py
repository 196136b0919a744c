"""Text on its way into and out of the model: tokenizers, and the wording of conversations.

It imports no JAX and knows no model: where rows are packed is `training/`, where tokens are drawn `generation/`.
"""
