"""Masks of detections from arrays and back, by pycocotools."""

import warnings

import numpy as np
from pycocotools import mask as mask_utils


def pack(masks):
  """The fields `size` and `rles` of `Detections` for masks [N, H, W]."""
  rles = (mask_utils.encode(np.asfortranarray(m, np.uint8)) for m in masks)
  return {
    "size": masks.shape[1:],
    "rles": tuple(rle["counts"] for rle in rles),
  }


def unpack(detections):
  """The masks [N, H, W] bool of detections."""
  size = list(detections.size)
  masks = [decode({"size": size, "counts": c}) for c in detections.rles]
  return np.array(masks, bool).reshape(-1, *size)


def decode(rle):
  with warnings.catch_warnings():  # pycocotools 2.0.11 on NumPy 2
    warnings.simplefilter("ignore", DeprecationWarning)
    return mask_utils.decode(rle)
