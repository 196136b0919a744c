"""From logits to text: sampling, decoding, speculation."""
