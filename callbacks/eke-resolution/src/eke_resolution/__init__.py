"""Progressive resolution and patch size for Vision Transformers."""

from eke_resolution.callback import Resolution, resize_kernel, resize_positions, scale_at

__all__ = ["Resolution", "resize_kernel", "resize_positions", "scale_at"]
