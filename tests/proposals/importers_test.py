"""Tests of proposals from other programs, with hand-made files."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pycocotools.mask
import pytest
import scipy.io

from jtsm_jax.proposals import importers
from jtsm_jax.proposals.fill_store import fill_store
from jtsm_jax.proposals.store import open_store
from jtsm_jax.types import InputError, Record
from tests.proposals.fill_store_test import make_source


def mat_content():
  """Four superpixels, of which the ids are 1, 2, 4 and 7."""
  superpixels = np.array([[1, 1, 2, 2], [1, 4, 4, 7], [7, 7, 7, 7]], float)
  labels = np.empty((5, 1), object)
  for n, ids in enumerate(([1, 2], [4], [7], [2, 1, 3], [2, 4])):
    labels[n, 0] = np.array([ids], float)  # 3 has no pixel
  scores = np.array([[0.5], [0.9], [0.1], [0.7], [0.7]])
  return dict(superpixels=superpixels, labels=labels, scores=scores)


def test_mat_by_hand(tmp_path):
  scipy.io.savemat(tmp_path / "a.mat", mat_content())
  found = importers.read_mat(tmp_path / "a.mat")
  np.testing.assert_array_equal(
    found.superpixels, [[0, 0, 1, 1], [0, 2, 2, 3], [3, 3, 3, 3]]
  )
  # Best first; of the two equal sets {1, 2} the better one; ties in order.
  np.testing.assert_array_equal(
    found.membership, [[0, 0, 1, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
  )
  np.testing.assert_allclose(found.scores, [0.9, 0.7, 0.7, 0.1])
  np.testing.assert_array_equal(
    found.boxes, [[1, 1, 2, 3], [0, 0, 2, 4], [0, 1, 2, 4], [1, 0, 3, 4]]
  )
  assert found.superpixels.dtype == found.boxes.dtype == np.int32
  assert found.scores.dtype == np.float32


def test_masks_of_one_box_are_kept(tmp_path):
  content = mat_content()
  content["superpixels"] = np.array([[1, 2], [2, 1]])
  for n, ids in enumerate(([1], [2], [1, 2], [2], [1])):
    content["labels"][n, 0] = np.array([ids])
  scipy.io.savemat(tmp_path / "a.mat", content)
  found = importers.read_mat(tmp_path / "a.mat")
  assert len(found.membership) == 3
  assert len(np.unique(found.boxes, axis=0)) == 1


def test_only_the_best(tmp_path):
  scipy.io.savemat(tmp_path / "a.mat", mat_content())
  found = importers.read_mat(tmp_path / "a.mat", max_proposals=2)
  np.testing.assert_allclose(found.scores, [0.9, 0.7])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(superpixels=None), "holds no 'superpixels'"),
    (dict(scores=np.zeros(4)), "scores are"),
    (dict(scores=np.full(5, np.nan)), "not finite"),
    (dict(labels=np.zeros((5, 1))), "wanted cells"),
    (dict(superpixels=np.zeros((3, 4))), "counted from 1"),
    (dict(superpixels=np.full((3, 4), 1.5)), "whole numbers"),
    (dict(superpixels=np.ones((3, 4)) * 9), "no pixel"),
  ],
)
def test_wrong_mat(tmp_path, change, message):
  content = {k: v for k, v in (mat_content() | change).items() if v is not None}
  scipy.io.savemat(tmp_path / "a.mat", content)
  with pytest.raises(InputError, match=message):
    importers.read_mat(tmp_path / "a.mat")


@pytest.mark.parametrize("ids", [[], [0, 1], [-3]])
def test_labels_that_are_no_superpixels(tmp_path, ids):
  content = mat_content()
  content["labels"][1, 0] = np.array([ids], float)
  scipy.io.savemat(tmp_path / "a.mat", content)
  with pytest.raises(InputError, match="counted from 1"):
    importers.read_mat(tmp_path / "a.mat")


def test_damaged_mat_never_crashes(tmp_path):
  """Cut anywhere, or with any byte changed: an InputError or proposals."""
  path = tmp_path / "a.mat"
  scipy.io.savemat(path, mat_content(), do_compression=True)
  data = path.read_bytes()
  faults = []
  for n in range(0, len(data), 3):
    for bad in (data[:n], data[:n] + bytes([data[n] ^ 0x55]) + data[n + 1 :]):
      path.write_bytes(bad)
      try:
        importers.read_mat(path)
      except InputError as error:
        faults.append(str(error))
  assert len(faults) > len(data) / 3
  assert all(str(path) in fault for fault in faults)


def test_a_pickle_is_no_mat(tmp_path):
  path = tmp_path / "a.mat"
  path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch PWNED'\ntR.")
  with pytest.raises(InputError, match="not a MATLAB 5 file"):
    importers.read_mat(path)


def random_masks(count=9, shape=(20, 24), seed=0):
  """Overlapping rectangles, the last equal to the first."""
  rng = np.random.default_rng(seed)
  masks = np.zeros((count, *shape), bool)
  for mask in masks:
    y, x = rng.integers(0, 12, 2)
    mask[y : y + rng.integers(1, 9), x : x + rng.integers(1, 12)] = True
  masks[-1] = masks[0]
  return masks


def entries_of(masks, scores, image_id="im-0", *, compress=True):
  """COCO's result format, from its own coder."""
  entries = []
  for mask, score in zip(masks, scores, strict=True):
    rle = pycocotools.mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    counts = rle["counts"].decode()
    if not compress:
      flat = mask.ravel(order="F")
      edges = np.flatnonzero(np.diff(flat, prepend=False))
      counts = np.diff([0, *edges, flat.size]).tolist()
    segmentation = {"size": list(mask.shape), "counts": counts}
    entries.append(
      dict(image_id=image_id, segmentation=segmentation, score=float(score))
    )
  return entries


@pytest.mark.parametrize("compress", [True, False])
def test_overlapping_masks_round_trip(compress):
  masks = random_masks()
  scores = np.random.default_rng(1).random(len(masks))
  scores[-1] = 2.0
  found = importers.proposals_from_masks(
    entries_of(masks, scores, compress=compress)
  )
  order = [n for n in np.argsort(-scores) if n != 0]  # 0 equals the last
  np.testing.assert_array_equal(
    found.membership[:, found.superpixels], masks[order]
  )
  np.testing.assert_allclose(found.scores, scores[order].astype(np.float32))
  for mask, box in zip(masks[order], found.boxes, strict=True):
    y, x = np.nonzero(mask)
    np.testing.assert_array_equal(
      box, [y.min(), x.min(), y.max() + 1, x.max() + 1]
    )
  # The coarsest map that can tell the masks apart.
  assert len(np.unique(masks.reshape(len(masks), -1), axis=1).T) == len(
    found.membership.T
  )


@pytest.mark.parametrize("seed", range(20))
def test_compressed_runs_equal_cocos_own(seed):
  rng = np.random.default_rng(seed)
  mask = rng.random((rng.integers(1, 90), rng.integers(1, 700))) < rng.random()
  mask[0, 0] = True
  entry = entries_of([mask], [1])[0]["segmentation"]
  np.testing.assert_array_equal(importers._decode("x", entry), mask)


def wrong(**change):
  entry = entries_of(random_masks(1), [1.0])[0]
  entry["segmentation"] |= change.pop("rle", {})
  return [entry | change]


@pytest.mark.parametrize(
  ("entries", "message"),
  [
    (wrong(segmentation=[[1, 2, 3, 4]]), "no RLE"),
    (wrong(segmentation=None), "no RLE"),
    (wrong(rle=dict(size=[20, -24])), "no RLE"),
    (wrong(rle=dict(size=[1 << 20, 1 << 20])), "no RLE"),  # 1 TB
    (wrong(rle=dict(size=[20, 25])), "do not fill"),
    (wrong(rle=dict(counts="~~~")), "damaged"),
    (wrong(rle=dict(counts="o" * 40)), "damaged"),
    (wrong(rle=dict(counts="P")), "no complete string"),
    (wrong(rle=dict(counts=[481, -1])), "do not fill"),
    (wrong(rle=dict(counts=[480])), "no pixel"),
    (wrong(rle=dict(counts=17)), "do not fill"),
    (wrong(score="high"), "a score is"),
    (wrong(score=float("nan")), "a score is"),
    (
      wrong() + entries_of(np.ones((1, 4, 4), bool), [1]),
      "wanted one size",
    ),
  ],
)
def test_wrong_masks(entries, message):
  with pytest.raises(InputError, match=message):
    importers.proposals_from_masks(entries)


def test_too_many_superpixels():
  with pytest.raises(InputError, match="more than the 3"):
    importers.proposals_from_masks(
      entries_of(random_masks(), np.ones(9)), max_superpixels=3
    )


def test_a_folder_of_mat_files_fills_a_store(tmp_path):
  (tmp_path / "mcg").mkdir()
  content = mat_content()
  content["superpixels"] = np.kron(content["superpixels"], np.ones((7, 6)))[:20]
  for name in ("im-0", "im-2"):
    scipy.io.savemat(tmp_path / "mcg" / f"{name}.mat", content)
  maker = importers.importer(
    tmp_path / "mcg",
    make_source(3).image_ids,
    max_proposals=3,
    max_superpixels=9,
  )
  done = fill_store(
    make_source(3), tmp_path / "store", maker, num_workers=1, report=str
  )
  assert (done.made, done.quarantined) == (2, ("im-1",))
  found = open_store(tmp_path / "store").get("im-2")
  np.testing.assert_allclose(found.scores, [0.9, 0.7, 0.7])


def test_a_json_file_fills_a_store(tmp_path):
  masks = random_masks()
  entries = entries_of(masks, np.arange(9.0))
  entries += entries_of(masks[:1], [1.0], image_id=17)
  (tmp_path / "sam.json").write_text(json.dumps(entries))
  source = make_source(2)
  coco = "000000000017"  # as COCO names its files
  source[1] = dataclasses.replace(source[1], image_id=coco)
  maker = importers.importer(
    tmp_path / "sam.json",
    source.image_ids,
    max_proposals=50,
    max_superpixels=99,
  )
  done = fill_store(source, tmp_path / "store", maker, num_workers=0)
  assert done.made == 2
  found = open_store(tmp_path / "store").get(coco)
  np.testing.assert_array_equal(
    found.membership[0][found.superpixels], masks[0]
  )


@pytest.mark.parametrize("form", ["mat", "json"])
@pytest.mark.parametrize(
  ("image_ids", "names", "found"),
  [
    (["000017", "b"], ["17", "b"], {"000017": "17", "b": "b"}),
    (["17"], ["0017"], {"17": "0017"}),
    (["1", "001"], ["1", "001"], {"1": "1", "001": "001"}),
    (["1", "001"], ["1"], {"1": "1"}),  # which is another image's
    (["001"], ["1", "01"], {}),  # either may be meant
    (["0_a", "_a"], ["_a"], {"_a": "_a"}),
  ],
)
def test_names_with_other_zeros(tmp_path, form, image_ids, names, found):
  score = {name: (n + 1) / 8 for n, name in enumerate(names)}
  if form == "mat":
    source = tmp_path
    for name in names:
      scores = np.full(5, score[name])
      content = mat_content() | {"scores": scores}
      scipy.io.savemat(tmp_path / f"{name}.mat", content)
  else:
    source = tmp_path / "sam.json"
    entries = [
      entry
      for name in names
      for entry in entries_of(random_masks(1), [score[name]], name)
    ]
    source.write_text(json.dumps(entries))
  maker = importers.importer(
    source, image_ids, max_proposals=9, max_superpixels=9
  )
  for image_id in image_ids:
    record = Record(image_id, b"", 0, 0, ())
    if image_id in found:
      proposals = maker.make(maker.read(record))
      assert proposals.scores[0] == np.float32(score[found[image_id]])
    else:
      with pytest.raises(InputError, match=f"there is no .*{image_id}"):
        maker.read(record)


def test_equal_masks_do_not_count_as_several():
  masks = random_masks(3)[[0, 0, 1]]
  assert (masks[0] != masks[2]).any()
  found = importers.proposals_from_masks(
    entries_of(masks, [0.9, 0.8, 0.7]), max_proposals=2, max_superpixels=9
  )
  np.testing.assert_allclose(found.scores, [0.9, 0.7])


@pytest.mark.parametrize("form", ["mat", "json"])
def test_the_key_is_of_what_there_is_of_the_images(tmp_path, form):
  (tmp_path / "mcg").mkdir()
  score = {"007": 0.25, "b": 0.5}

  def keys(*image_ids):
    """That of a store, and of images; files have no leading zeros."""
    source = tmp_path / ("mcg" if form == "mat" else "sam.json")
    entries = []
    for name, value in score.items():
      name = name.lstrip("0")
      entries += entries_of(random_masks(1), [value], name)
      if form == "mat":
        scipy.io.savemat(source / f"{name}.mat", mat_content())
        os.utime(source / f"{name}.mat", (0, 10 * value))
    if form == "json":
      source.write_text(json.dumps(entries))
    maker = importers.importer(
      source, image_ids, max_proposals=3, max_superpixels=9
    )
    return maker.key, {name: maker.key_of(name) for name in image_ids}

  key, keys_of = keys("007", "b")
  assert keys("b", "007") == (key, keys_of)  # in any order
  assert keys_of["007"] != keys_of["b"]
  score["new"] = 1.0
  assert keys("007", "b") == (key, keys_of)
  assert keys("007", "b", "new")[0] != key
  score["007"] = 0.75
  corrected, corrected_of = keys("007", "b")
  assert corrected != key
  assert corrected_of["007"] != keys_of["007"]
  assert corrected_of["b"] == keys_of["b"]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("[", "neither a folder"),
    ("{}", "wanted a list"),
    ("[{}]", "entry 0 names no image_id"),
    ("[" * 100_000, "neither a folder"),
  ],
)
def test_wrong_json(tmp_path, text, message):
  path = tmp_path / "sam.json"
  path.write_text(text)
  with pytest.raises(InputError, match=message):
    importers.importer(path, [], max_proposals=5, max_superpixels=5)


def test_no_source(tmp_path):
  with pytest.raises(InputError, match="neither a folder"):
    importers.importer(tmp_path / "no", [], max_proposals=5, max_superpixels=5)
