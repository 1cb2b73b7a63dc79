"""Mask of Interest Pooling (PAPER section 3.3)."""

from .api import masked_average, moi_pool

__all__ = ["masked_average", "moi_pool"]
