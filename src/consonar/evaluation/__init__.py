"""Measuring samples and tokenizers; start at `evaluate.evaluate` and `reconstruction.reconstruction_metrics`."""
