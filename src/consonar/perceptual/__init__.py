"""Perceptual distances of image pairs: EfficientNet-Lite0 (weights come with pip) and LPIPS (weights from a file)."""

from consonar.perceptual import efficientnet, lpips

SMALLEST_INPUT = {"efficientnet-lite0": efficientnet.SMALLEST_INPUT, "lpips": lpips.SMALLEST_INPUT}
"""Smallest image side in pixels that each distance takes, by name."""
