"""Text on its way into and out of the model; imports no JAX."""
