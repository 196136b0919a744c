"""From logits to text: sampling."""
