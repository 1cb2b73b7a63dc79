"""Mask of Interest Pooling (PAPER section 3.3)."""

from pallas_kernels.moi_pool.api import masked_average, moi_pool

__all__ = ["masked_average", "moi_pool"]
