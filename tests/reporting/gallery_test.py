"""The page: what is in it, and that nothing of it can break out."""

import html.parser
import json

import numpy as np
import pytest

from jtsm_jax.reporting import gallery
from jtsm_jax.types import Categories, Category, InputError

EVIL = '</script><img src="x" onerror="alert(1)">&\u2028'
CATEGORIES = Categories((Category(1, EVIL, True), Category(2, "grass", False)))


class Page(html.parser.HTMLParser):
  """The elements of a page, and what its data element holds."""

  def __init__(self, text):
    super().__init__(convert_charrefs=True)
    self.tags, self.title, self._inside, self._data = [], "", "", ""
    self.feed(text)
    self.data = json.loads(self._data)

  def handle_starttag(self, tag, attributes):
    attributes = dict(attributes)
    self.tags.append((tag, attributes))
    self._inside = "data" if attributes.get("id") == "data" else tag

  def handle_endtag(self, tag):
    self._inside = ""

  def handle_data(self, text):
    if self._inside == "data":
      self._data += text
    if self._inside == "title":
      self.title += text


def make_image(**changes):
  picture = gallery.Picture("images/0.jpg", EVIL, EVIL)
  values = {
    "id": EVIL,
    "width": 4,
    "height": 3,
    "cover": ["images/0.jpg", "images/1.jpg"],
    "groups": [gallery.Group(EVIL, [picture], category=0, note=EVIL)],
    "tags": [0],
    "facts": [("Tags", [(0, 1)])],
    "classes": [0, 1],
    "pq": 12.5,
  }
  return gallery.Image(**(values | changes))


def write(path, **changes):
  values = {
    "title": EVIL + "@@DATA@@",
    "summary": [("Data set", EVIL)],
    "categories": CATEGORIES,
    "metrics": {"all": {"pq": float("nan"), "n": np.int64(3)}},
    "curves": [{"name": EVIL, "points": [[1, float("inf")]], "logged": 1}],
    "sections": [gallery.Section("val", "Images", EVIL, [make_image()])],
    "settings": {EVIL: EVIL},
  }
  gallery.write_page(path, **(values | changes))
  return Page(path.read_text("utf-8"))


def test_names_of_any_kind_stay_data(tmp_path):
  page = write(tmp_path / "new" / "index.html")
  plain = write(
    tmp_path / "plain.html",
    title="t",
    categories=Categories((Category(1, "cow", True), CATEGORIES.items[1])),
    sections=[],
    curves=[],
    settings={},
    summary=[],
  )
  assert page.tags == plain.tags  # no element more than the template has
  assert page.title == EVIL + "@@DATA@@"
  data = page.data
  assert data["title"] == EVIL + "@@DATA@@"
  assert data["classes"][0]["name"] == EVIL
  assert data["sections"][0]["images"][0]["id"] == EVIL
  assert data["sections"][0]["images"][0]["groups"][0]["note"] == EVIL
  assert data["settings"] == {EVIL: EVIL}


def test_numbers_that_are_none_become_null(tmp_path):
  data = write(tmp_path / "index.html").data
  assert data["metrics"] == {"all": {"pq": None, "n": 3}}
  assert data["curves"][0]["points"] == [[1, None]]
  image = data["sections"][0]["images"][0]
  assert (image["pq"], image["classes"]) == (12.5, [0, 1])


def test_page_asks_for_nothing_outside_its_folder(tmp_path):
  page = write(tmp_path / "index.html")
  addresses = [
    value
    for _, attributes in page.tags
    for name, value in attributes.items()
    if name in ("src", "href", "srcset", "action", "poster")
  ]
  assert addresses
  assert all(a.startswith(("#", "data:")) for a in addresses)
  (policy,) = (
    a["content"]
    for tag, a in page.tags
    if a.get("http-equiv") == "Content-Security-Policy"
  )
  assert "default-src 'none'" in policy
  assert "http" not in policy


def test_class_colours_and_ramp_are_colours(tmp_path):
  data = write(tmp_path / "index.html").data
  colours = [c["colour"] for c in data["classes"]] + data["ramp"]
  assert all(len(c) == 7 and int(c[1:], 16) >= 0 for c in colours)
  # matplotlib's viridis, from its own table.
  matplotlib = pytest.importorskip("matplotlib")
  wanted = matplotlib.colormaps["viridis"]([0.0, 0.5, 1.0])[:, :3] * 255
  found = [
    [int(c[i : i + 2], 16) for i in (1, 3, 5)]
    for c in (data["ramp"][0], data["ramp"][4], data["ramp"][8])
  ]
  np.testing.assert_allclose(found, wanted, atol=3)


# Curves.


def test_curves_are_the_series_of_the_file(tmp_path):
  path = tmp_path / "metrics.jsonl"
  lines = [
    {"step": 2, "time": 1.0, "loss/mil": 3.5, "speed": 9},
    {"step": 4, "time": 2.0, "loss/mil": None},
    {"step": 4, "time": 3.0, "val/pq": 50.0},
  ]
  torn = '{"step": 6, "loss/m'
  path.write_text("".join(json.dumps(x) + "\n" for x in lines) + torn)
  assert gallery.read_curves(path) == [
    {"name": "loss/mil", "points": [[2, 3.5], [4, None]], "logged": 2},
    {"name": "speed", "points": [[2, 9]], "logged": 1},
    {"name": "val/pq", "points": [[4, 50.0]], "logged": 1},
  ]


def test_no_curves_of_an_absent_or_empty_file(tmp_path):
  path = tmp_path / "metrics.jsonl"
  assert gallery.read_curves(path) == []
  path.write_text("")
  assert gallery.read_curves(path) == []


def test_long_curves_keep_their_ends(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text(
    "".join(f'{{"step": {n}, "a": {n * n}}}\n' for n in range(5000))
  )
  [curve] = gallery.read_curves(path)
  steps = [step for step, _ in curve["points"]]
  assert curve["logged"] == 5000
  assert len(steps) == gallery.MAX_POINTS
  assert (steps[0], steps[-1]) == (0, 4999)
  assert set(np.diff(steps)) <= {12, 13}
  assert all(value == step * step for step, value in curve["points"])


@pytest.mark.parametrize("line", ["{", "[1]", '{"a": 1}', '{"step": null}'])
def test_damaged_line_is_named(line, tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n' + line + "\n")
  with pytest.raises(InputError, match="line 2 is no metrics line"):
    gallery.read_curves(path)


# Which images are shown.


@pytest.mark.parametrize(
  ("count", "limit", "wanted"),
  [
    (0, 5, []),
    (3, 0, []),
    (3, -1, []),
    (3, 1, [0]),
    (3, 2, [0, 2]),
    (3, 9, [0, 1, 2]),
    (9, 3, [0, 4, 8]),
  ],
)
def test_spread(count, limit, wanted):
  assert gallery.spread(count, limit) == wanted


@pytest.mark.parametrize(
  ("pq", "limit", "wanted"),
  [
    ([], 4, []),
    ([3.0, 1.0, 2.0], 9, [0, 1, 2]),
    ([3.0, 1.0, 2.0], 0, []),
    ([3.0, 1.0, 2.0], 1, [1]),
    # The two worst are 20 and 30; of the others the best and the worst.
    ([90.0, 20.0, 60.0, 30.0, 50.0, 70.0], 4, [0, 1, 3, 4]),
    ([None, 5.0, None], 2, [0, 1]),
    ([None] * 5, 3, [0, 2, 4]),
  ],
)
def test_choice_has_the_worst_and_some_others(pq, limit, wanted):
  assert gallery.choose(pq, limit) == wanted
