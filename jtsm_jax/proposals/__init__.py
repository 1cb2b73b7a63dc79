"""Segment proposals: from an image to ranked sets of superpixels."""

from jtsm_jax.proposals.generate import generate_proposals

__all__ = ["generate_proposals"]
