"""The page in a browser, used as people use it: Debian's headless Chromium."""

import contextlib
import os
import pathlib
import shutil

import cv2
import numpy as np
import pytest

from jtsm_jax.reporting import gallery
from jtsm_jax.types import Categories, Category

playwright = pytest.importorskip(
  "playwright.sync_api", reason="the extra 'test' has playwright"
)
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
  pytest.skip(
    "there is no chromium: apt-get install chromium", allow_module_level=True
  )

ROOT = pathlib.Path(__file__).parents[2]
EVIL = "<img src=x onerror=alert(1)>"
CATEGORIES = Categories(
  (
    Category(1, "cow", True),
    Category(2, EVIL, True),
    Category(3, "grass", False),
  )
)
DESKTOP = {"viewport": {"width": 1280, "height": 900}}
PHONE = {
  "viewport": {"width": 390, "height": 844},
  "is_mobile": True,
  "has_touch": True,
}
NUM_IMAGES = 130
METRICS = {
  "step": 1300,
  "split": "val",
  "all": {"pq": 41.26, "sq": 80.0, "rq": 51.0, "n": 2},
  "things": {"pq": 22.5, "sq": 80.0, "rq": 28.0, "n": 1},
  "stuff": {"pq": 60.0, "sq": 80.0, "rq": 75.0, "n": 1},
  "per_class": {
    "cow": {"pq": 22.5, "sq": 75, "rq": 30, "tp": 3, "fp": 4, "fn": 10},
    EVIL: {"pq": 0, "sq": 0, "rq": 0, "tp": 0, "fp": 0, "fn": 0},
    "grass": {"pq": 60.0, "sq": 80, "rq": 75, "tp": 6, "fp": 2, "fn": 2},
  },
  "semantic": {
    "miou": 22.2,
    "n": 2,
    "per_class": {
      "cow": {"iou": 44.4, "target_pixels": 90, "predicted_pixels": 80},
      EVIL: {"iou": 0.0, "target_pixels": 0, "predicted_pixels": 0},
      "grass": {"iou": 0.0, "target_pixels": 0, "predicted_pixels": 7},
    },
  },
  "voc": {"map50": 12.5, "per_class": {"cow": {"ap50": 12.5, "objects": 3}}},
}


def make_image(n, *, classes, pq):
  pictures = [
    gallery.Picture("images/0.jpg", "Photograph", "Photograph"),
    gallery.Picture("images/1.jpg", "Prediction", f"Prediction: {EVIL}"),
  ]
  return gallery.Image(
    id=f"image {n} {EVIL}" if n == 7 else f"image {n}",
    width=40,
    height=30,
    cover=["images/0.jpg", "images/1.jpg"],
    groups=[
      gallery.Group("Result", pictures),
      gallery.Group("cow", pictures[:1], category=0, note="A note."),
    ],
    tags=classes,
    facts=[("Tags", [(k, 1) for k in classes]), ("Predicted", [(0, 2)])],
    classes=classes,
    pq=pq,
  )


def val_images():
  """Image n has the PQ 90 - n / 2; every tenth is a cow, 7 is evil."""
  return [
    make_image(
      n,
      classes=[1] if n == 7 else [0, 2] if n % 10 == 0 else [2],
      pq=None if n == 3 else 90 - n / 2,
    )
    for n in range(NUM_IMAGES)
  ]


def write(folder, *, images, metrics=METRICS):
  (folder / "images").mkdir(parents=True)
  for n in range(2):
    picture = np.full((30, 40, 3), 90 + 100 * n, np.uint8)
    cv2.imwrite(str(folder / "images" / f"{n}.jpg"), picture)
  train = [make_image(n, classes=[0], pq=None) for n in range(3)]
  curves = [
    {"name": "loss/total", "points": [[50, 9.5], [100, 1.25]], "logged": 2},
    {"name": "loss/mil", "points": [[50, 4.0], [100, None]], "logged": 2},
    {"name": "val/pq", "points": [[100, 40.0]], "logged": 1},
    {"name": "val/small", "points": [[50, -4.56e-6], [9e6, 0.0]], "logged": 2},
    {"name": "val/rate", "points": [[50, 0.000673], [100, 0.0]], "logged": 2},
    {"name": "val/large", "points": [[50, 123456789], [99, 0.0]], "logged": 2},
    {"name": EVIL, "points": [[50, None]], "logged": 1},
  ]
  gallery.write_page(
    folder / "index.html",
    title="Report of a run",
    summary=[("Data set", EVIL), ("Steps", "1,300")],
    categories=CATEGORIES,
    metrics=metrics,
    curves=curves,
    sections=[
      gallery.Section("val", "Validation images", "A note.", images),
      gallery.Section("train", "Training images", "Another note.", train),
    ],
    settings={"seed": 0, "data": {"root": EVIL}},
  )
  return folder / "index.html"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
  return write(tmp_path_factory.mktemp("a b") / "report", images=val_images())


@pytest.fixture(scope="module")
def browser():
  with playwright.sync_playwright() as driver:
    # Chromium refuses its sandbox to root, as whom machines for tests work.
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
    yield browser
    browser.close()


@contextlib.contextmanager
def opened(browser, path, **settings):
  """The page, which must neither complain nor ask for what is elsewhere."""
  context = browser.new_context(**settings)
  page = context.new_page()
  faults = []
  page.on(
    "console",
    lambda m: faults.append(m.text) if m.type in ("error", "warning") else None,
  )
  page.on("pageerror", lambda error: faults.append(str(error)))
  page.on("requestfailed", lambda request: faults.append(request.url))
  page.on("dialog", lambda dialog: faults.append(dialog.message))
  root = path.parent.as_uri()

  def note(request):
    if not request.url.startswith((root, "data:")):
      faults.append(f"asks for {request.url}")

  page.on("request", note)
  page.goto(path.as_uri())
  yield page
  page.wait_for_load_state("networkidle")
  assert faults == []
  context.close()


def ids(page, part="val"):
  return page.locator(f"#images-{part} .card .id").all_inner_texts()


def wait_for_focus(page, text):
  """Fails if no element whose text begins so gets the focus."""
  page.wait_for_function(
    "text => document.activeElement.innerText.startsWith(text)",
    arg=text,
    timeout=5000,
  )


def open_details(page):
  """Opens all that is folded away, which is made when it is opened."""
  for summary in page.locator("summary").all():
    summary.click()
  for details in page.locator("#curves details").all():
    details.locator("table").wait_for()


def test_figures(browser, page_file):
  with opened(browser, page_file, **DESKTOP) as page:
    tiles = page.locator("#figures .tile").all_inner_texts()
    assert [t.split("\n") for t in tiles] == [
      ["PQ", "41.3"],
      ["PQ of things", "22.5"],
      ["PQ of stuff", "60.0"],
      ["mIoU", "22.2"],
      ["AP of masks at IoU 0.5", "12.5"],
    ]
    rows = page.locator("#figures tbody tr")
    assert [r.split() for r in rows.all_inner_texts()] == [
      ["cow", "22.5", "75.0", "30.0", "44.4", "12.5", "3", "4", "10"],
      [*EVIL.split(), "–", "–", "–", "–", "–", "0", "0", "0"],
      ["grass", "60.0", "80.0", "75.0", "0.0", "–", "6", "2", "2"],
    ]
    widths = [
      bar.bounding_box()["width"] for bar in page.locator(".bar i").all()
    ]
    whole = page.locator(".bar").first.bounding_box()["width"]
    np.testing.assert_allclose(
      np.divide(widths, whole), [0.225, 0, 0.6], atol=0.01
    )
    # Sorted by a click on a heading: the best, then the worst on top.
    head = page.locator("#figures thead th")
    for wanted, order in (("grass", "descending"), (EVIL, "ascending")):
      page.get_by_role("button", name="PQ", exact=False).first.click()
      assert rows.first.inner_text().startswith(wanted)
      assert head.nth(1).get_attribute("aria-sort") == order


def test_curves_can_be_read_without_seeing_them(browser, page_file):
  with opened(browser, page_file, **DESKTOP) as page:
    names = [
      x.get_attribute("aria-label") for x in page.get_by_role("img").all()
    ]
    assert names[0] == (
      "loss/total: 9.5 at step 50, 1.25 at step 100; between 1.25 and 9.5"
    )
    assert names[1].startswith("loss/mil: 4 at step 50, 4 at step 50")
    assert page.locator("#curves h3").all_inner_texts() == [
      "Losses",
      "Validation",
      "Others",
    ]
    assert "no finite value" in page.locator("#curves").inner_text()
    open_details(page)
    rows = page.locator("#curves tbody").first.locator("tr").all_inner_texts()
    assert [r.split() for r in rows] == [
      ["50", "9.5", "4"],
      ["100", "1.25", "–"],
    ]
    # The value under the pointer.
    chart = page.locator(".chart svg").first
    value = page.locator(".chart .value").first
    assert value.inner_text() == "step 100: 1.25"
    box = chart.bounding_box()
    chart.hover(position={"x": box["width"] * 0.2, "y": 20})
    assert value.inner_text() == "step 50: 9.5"


@pytest.mark.parametrize("settings", [DESKTOP, PHONE])
def test_numbers_of_axes_are_whole(browser, page_file, settings):
  with opened(browser, page_file, **settings) as page:
    for chart in page.locator(".chart svg").all():
      whole = chart.bounding_box()
      for text in chart.locator("text").all():
        box = text.bounding_box()
        assert box["x"] >= whole["x"], text.inner_html()
        end = whole["x"] + whole["width"]
        assert box["x"] + box["width"] <= end, text.inner_html()


def test_filter_sort_and_search(browser, page_file):
  with opened(browser, page_file, **DESKTOP) as page:
    assert ids(page)[:3] == ["image 129", "image 128", "image 127"]
    page.get_by_label("Order").select_option("best")
    assert ids(page)[:4] == ["image 0", "image 1", "image 2", "image 4"]
    page.get_by_label("Order").select_option("name")
    assert ids(page)[:4] == ["image 0", "image 1", "image 2", "image 3"]
    kind = page.get_by_label("Class, in tags or prediction")
    kind.select_option("cow")
    assert ids(page) == [f"image {n}" for n in range(0, NUM_IMAGES, 10)]
    status = page.locator("#images-val [role=status]")
    assert status.inner_text() == "13 of 130 images"
    search = page.get_by_label("Name contains").first
    search.fill("IMAGE 2")
    assert ids(page) == ["image 20"]
    search.fill("no such image")
    assert ids(page) == []
    assert "No image fits" in page.locator("#images-val").inner_text()
    search.fill("")
    kind.select_option(EVIL)
    assert ids(page) == [f"image 7 {EVIL}"]
    kind.select_option("All classes")
    assert status.inner_text() == "130 images"
    # What has no PQ comes last in either order.
    search.fill("image 3")
    page.get_by_label("Order").select_option("worst")
    assert ids(page)[-1] == "image 3"
    page.get_by_label("Order").select_option("best")
    assert ids(page)[-1] == "image 3"


def test_cards_are_added_as_asked_for(browser, page_file):
  with opened(browser, page_file, **DESKTOP) as page:
    assert len(ids(page)) == 60
    page.get_by_role("button", name="Show 60 more").click()
    assert len(ids(page)) == 120
    wait_for_focus(page, "image 69")  # the first new one
    page.get_by_role("button", name="Show 10 more").click()
    assert len(ids(page)) == NUM_IMAGES
    assert page.get_by_role("button", name="more").count() == 0
    lazy = page.locator(".card img:not([loading=lazy])")
    assert lazy.count() == 0


def test_viewer_by_keyboard(browser, page_file):
  with opened(browser, page_file, **DESKTOP) as page:
    page.get_by_label("Order").select_option("name")
    page.locator("#images-val .card").nth(1).focus()
    page.keyboard.press("Enter")
    viewer = page.get_by_role("dialog")
    title = viewer.locator("h2")
    position = viewer.locator("#viewer-position")
    assert title.inner_text() == "image 1, PQ 89.5"
    assert position.inner_text() == "Image 2 of 130"
    wait_for_focus(page, "image 1, PQ 89.5")
    for key, wanted in (
      ("ArrowRight", "image 2, PQ 89.0"),
      ("ArrowRight", "image 3"),
      ("ArrowLeft", "image 2, PQ 89.0"),
      ("ArrowLeft", "image 1, PQ 89.5"),
      ("ArrowLeft", "image 0, PQ 90.0"),
      ("ArrowLeft", "image 0, PQ 90.0"),  # the first one stays
    ):
      page.keyboard.press(key)
      assert title.inner_text() == wanted
    before = viewer.get_by_role("button", name="Previous image")
    assert before.get_attribute("aria-disabled") == "true"
    # The focus goes round inside, and to the browser itself, but not below.
    inside = "document.activeElement.closest('dialog')"
    outside = "document.activeElement === document.body"
    for _ in range(8):
      page.keyboard.press("Tab")
      assert page.evaluate(f"!!{inside} || {outside}")
    page.keyboard.press("Escape")
    assert not viewer.is_visible()
    # Back on the card of the image that was seen last.
    wait_for_focus(page, "image 0")


def test_viewer_by_mouse(browser, page_file):
  with opened(browser, page_file, **DESKTOP) as page:
    page.get_by_label("Class, in tags or prediction").select_option("cow")
    page.locator("#images-val .card").first.click()
    viewer = page.get_by_role("dialog")
    title = viewer.locator("h2")
    assert title.inner_text() == "image 120, PQ 30.0"
    body = viewer.locator("#viewer-body")
    facts = body.locator("dd").all_text_contents()
    assert facts[:2] == ["cow, grass", "cow × 2"]
    assert body.locator("h3").all_inner_texts() == ["Result", "cow"]
    assert body.locator("figcaption").all_inner_texts() == [
      "Photograph",
      "Prediction",
      "Photograph",
    ]
    assert body.get_by_alt_text(f"Prediction: {EVIL}").count() == 1
    assert "A note." in body.inner_text()
    viewer.get_by_role("button", name="Next image").click()
    assert title.inner_text() == "image 110, PQ 35.0"
    viewer.get_by_role("button", name="Previous image").click()
    viewer.get_by_role("button", name="Close").click()
    assert not viewer.is_visible()
    wait_for_focus(page, "image 120")
    # A click beside it closes it, too.
    page.locator("#images-train .card").nth(2).click()
    assert title.inner_text() == "image 2"
    page.mouse.click(4, 4)
    assert not viewer.is_visible()


def test_focus_returns_to_a_card_that_was_not_there(browser, page_file):
  with opened(browser, page_file, **DESKTOP) as page:
    page.locator("#images-val .card").nth(59).click()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    assert len(ids(page)) == 120
    wait_for_focus(page, "image 69")


def test_skip_link_comes_first(browser, page_file):
  with opened(browser, page_file, **DESKTOP) as page:
    page.keyboard.press("Tab")
    wait_for_focus(page, "Skip to the content")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    levels = page.evaluate(
      "[...document.querySelectorAll('h1, h2, h3')]"
      ".filter(h => !h.closest('dialog')).map(h => Number(h.tagName[1]))"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert max(np.diff(levels)) <= 1


@pytest.mark.parametrize("settings", [DESKTOP, PHONE])
def test_nothing_is_wider_than_the_screen(browser, page_file, settings):
  width = settings["viewport"]["width"]
  too_wide = "document.documentElement.scrollWidth"
  with opened(browser, page_file, **settings) as page:
    open_details(page)
    assert page.evaluate(too_wide) <= width
    page.locator("#images-val .card").first.click()
    assert page.evaluate(too_wide) <= width
    body = page.locator("#viewer-body")
    assert body.evaluate("e => e.scrollWidth <= e.clientWidth")
    small = page.evaluate(
      "[...document.querySelectorAll('button, select, input, summary, nav a')]"
      ".map(e => [e.innerText, e.getBoundingClientRect()])"
      ".filter(([, b]) => b.width && (b.width < 24 || b.height < 24))"
      ".map(([text]) => text)"
    )
    assert small == []


BOXES = {
  "map": 40.5,
  "n": 1,
  "per_class": {
    "cow": {"ap": 40.5, "objects": 7},
    EVIL: {"ap": 0.0, "objects": 0},
  },
}
MASKS = {
  "map50": 33.25,
  "per_class": {
    "cow": {"ap25": 50.5, "ap50": 33.25, "ap75": 1.5, "objects": 7},
    EVIL: {"ap25": 0, "ap50": 0, "ap75": 0, "objects": 0},
  },
}
CORLOC = {
  "corloc": 61.5,
  "per_class": {
    "cow": {"corloc": 61.5, "images": 5},
    EVIL: {"corloc": 0.0, "images": 0},
  },
}


@pytest.mark.parametrize(
  ("metrics", "tiles", "head", "cow", "evil"),
  [
    (
      {"voc": BOXES, "coco": {"ap": 20.0}, "corloc": CORLOC},
      ["mAP of boxes 40.5", "CorLoc 61.5", "AP as in COCO 20.0"],
      ["Class", "", "AP", "CorLoc", "Objects"],
      ["40.5", "61.5", "7"],
      ["–", "–", "0"],
    ),
    (
      {"corloc": CORLOC},
      ["CorLoc 61.5"],
      ["Class", "", "CorLoc", "Images"],
      ["61.5", "5"],
      ["–", "0"],
    ),
    (
      {"voc": MASKS, "coco": {"ap": 20.0}},
      ["AP of masks at IoU 0.5 33.3", "AP as in COCO 20.0"],
      ["Class", "", "AP50", "AP25", "AP70", "AP75", "Objects"],
      ["33.3", "50.5", "–", "1.5", "7"],
      ["–", "–", "–", "–", "0"],
    ),
  ],
)
def test_figures_of_the_other_tasks(
  browser, tmp_path, metrics, tiles, head, cow, evil
):
  metrics = {"step": 5, "split": "val"} | metrics
  path = write(tmp_path / "report", images=[], metrics=metrics)
  with opened(browser, path, **DESKTOP) as page:
    found = page.locator("#figures .tile").all_inner_texts()
    named = {" ".join(t.split("\n")[::-1]) for t in found} | {
      " ".join(t.split("\n")) for t in found
    }
    assert named >= set(tiles)
    table = page.locator("#figures table")
    cells = table.locator("thead tr > *").all_inner_texts()
    assert [c.strip() for c in cells] == head
    rows = table.locator("tbody tr").all()
    for row, wanted in zip(rows, (cow, evil), strict=False):
      assert row.locator("td:not(.bars)").all_inner_texts() == wanted
    bar = rows[0].locator(".bar i").get_attribute("style")
    assert cow[0].split(".")[0] in bar


def test_without_figures_and_images(browser, tmp_path):
  path = write(tmp_path / "report", images=[], metrics=None)
  with opened(browser, path, **DESKTOP) as page:
    text = page.locator("main").inner_text()
    assert "nothing was measured" in text
    assert ids(page) == []
    assert ids(page, "train") == ["image 0", "image 1", "image 2"]
    assert "PQ" not in page.locator("#images-train").inner_text()


def test_thousands_of_images(browser, tmp_path):
  images = [make_image(n, classes=[2], pq=n / 100) for n in range(5000)]
  path = write(tmp_path / "report", images=images)
  with opened(browser, path, **DESKTOP) as page:
    assert len(ids(page)) == 60
    page.get_by_label("Order").select_option("best")
    assert ids(page)[0] == "image 4999"
    page.get_by_label("Name contains").first.fill("image 123")
    assert len(ids(page)) == 11


def axe_program():
  """axe-core, where `.ci/run` or the user has put it."""
  places = [
    os.environ.get("AXE_PATH"),
    ROOT / "node_modules" / "axe-core" / "axe.min.js",
  ]
  for place in filter(None, places):
    if pathlib.Path(place).is_file():
      return pathlib.Path(place).read_text("utf-8")
  pytest.skip("there is no axe-core: npm install --no-save axe-core")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("settings", [DESKTOP, PHONE])
def test_axe_finds_nothing(browser, page_file, settings, scheme):
  program = axe_program()

  def violations(page):
    page.evaluate(program)
    found = page.evaluate("axe.run()")["violations"]
    return [(v["id"], [n["html"] for n in v["nodes"]]) for v in found]

  with opened(browser, page_file, color_scheme=scheme, **settings) as page:
    open_details(page)
    assert violations(page) == []
    page.locator("#images-val .card").first.click()
    assert violations(page) == []
