"""Pages and contact sheets: everything is inside of the file, all of it can be seen."""

from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ltx2 import base, page
from ltx2.sheet import COLUMNS, GAP, LABEL, LANE, PAPER, Sheet

VOID = {"meta", "img", "link", "input", "br", "hr"}


class Page(HTMLParser):
    """Checks while it reads that each tag is closed and that nothing is loaded."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text, self.tags = [], "", []
        self.rows, self.marked = [], []  # of tables, lists of their cells
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert tag not in ("script", "link", "iframe")
        for name in {"src", "href", "xlink:href", "srcset", "data"} & attrs.keys():
            assert attrs[name].startswith(("data:", "#")), attrs[name][:40]
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
            if attrs.get("class") == "marked":
                self.marked.append(self.rows[-1])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            assert "url(" not in data and "@import" not in data
        elif self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        self.text += data


def printed(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines()]


def test_a_page_is_one_file_in_which_text_is_escaped(tmp_path):
    odd = "<script>alert(\"1\")</script> & 'x'"
    image = np.zeros((2, 3, 3), np.uint8)
    parts = [page.table([odd], [[odd]]), page.picture(image, odd)]
    parts.append(page.chart(odd, [[0.0, 1.0]], marks={1: odd}))
    page.write(tmp_path / "page.html", odd, [page.section(odd, odd, parts)])
    found = Page((tmp_path / "page.html").read_text("utf-8"))
    assert found.rows == [[odd], [odd]]
    # in title, h1, h2, p, th, td, the picture's caption, the mark, the chart's caption
    assert found.text.count(odd) == 9
    assert {"img", "svg", "circle"} <= set(found.tags)


def test_a_page_shows_the_numbers_of_the_printed_table():
    heads, rows = ["stage", "x", ""], [["a", 1 / 3, ""], ["b", float("nan"), "bad"]]
    found = Page(page.table(heads, rows, {1}))
    assert [list(filter(None, row)) for row in found.rows] == printed(
        base.table(heads, rows)
    )
    assert found.marked == [["b", "nan", "bad"]]


@pytest.mark.parametrize(
    "line", [[1.0], [], [float("nan")] * 3, [1.0, float("inf"), -1e30], [0.0] * 4]
)
def test_any_values_can_be_drawn(line):
    marks = dict.fromkeys(range(len(line)), "odd")
    chart = page.chart("odd", [line], [(line, line)], marks)
    assert Page(chart).tags.count("circle") == len(line)
    assert "nan" not in chart and "inf" not in chart


def test_a_chart_is_as_high_as_its_range():
    svg = page.chart("", [[-1.0, 3.0, 1.0]], [([-1.0] * 3, [3.0] * 3)])
    points = svg.split('polyline points="')[1].split('"')[0].split()
    heights = [float(point.split(",")[1]) for point in points]
    assert heights[0] == page.HEIGHT - page.EDGE and heights[1] == page.EDGE
    assert heights[1] < heights[2] < heights[0]


# Contact sheets


def sheet(total, shape=(48, 64), chunk=8, **options):
    """A sheet of frames whose gray is their number, passed in chunks."""
    frames = np.arange(total, dtype=np.uint8)[:, None, None, None]
    frames = np.broadcast_to(frames, (total, *shape, 3))
    events = [
        SimpleNamespace(
            frames=frames[i : i + chunk], step=min(i + chunk, total), steps=total
        )
        for i in range(0, total, chunk)
    ]
    events.append(SimpleNamespace(frames=None))
    made = Sheet(24, **options)
    assert list(made.watch(iter(events))) == events
    return made


def grays(made):
    return [image.getpixel((0, 0))[0] for _, image in made.tiles]


@pytest.mark.parametrize("total, count", [(121, 12), (12, 12), (9, 8), (3, 3), (1, 1)])
@pytest.mark.parametrize("chunk", [1, 8, 200])
def test_frames_are_picked_evenly_with_the_first_and_the_last(total, count, chunk):
    made = sheet(total, chunk=chunk)
    picked = grays(made)
    assert len(picked) == count and picked[0] == 0 and picked[-1] == total - 1
    assert max(np.diff(picked), default=1) - min(np.diff(picked), default=1) <= 1
    assert [seconds for seconds, _ in made.tiles] == [n / 24 for n in picked]


def test_frames_are_not_kept():
    """Only the small ones are."""
    made = sheet(24, shape=(600, 400))
    assert {image.size for _, image in made.tiles} == {(213, 320)}
    kept = sum(image.size[0] * image.size[1] * 3 for _, image in made.tiles)
    assert kept < 24 * 600 * 400 * 3 / 5


def test_a_sheet_has_its_tiles_their_times_and_the_waveform():
    made = sheet(25)
    loud = (
        np.sin(np.arange(24000))[:, None] * [1, 0.5] * np.linspace(0, 1, 24000)[:, None]
    )
    image = made.draw(loud.astype(np.float32), 24000)
    width, rows = COLUMNS * (64 + GAP) + GAP, 3 * (48 + LABEL + GAP)
    assert image.shape == (GAP + rows + 2 * LANE + LABEL + GAP, width, 3)
    for n, gray in enumerate(grays(made)):
        y, x = (
            i * side + GAP
            for i, side in zip(divmod(n, COLUMNS), (48 + LABEL + GAP, 64 + GAP))
        )
        assert (image[y : y + 48, x : x + 64] == gray).all()
        label = image[y + 48 : y + 48 + LABEL, x : x + 64]
        assert (label != PAPER).any()
    lanes = image[GAP + rows :][: 2 * LANE].reshape(2, LANE, width, 3)
    heights = (lanes != PAPER).any(-1).sum(1)  # of the waveform by channel and column
    left, right = heights[:, GAP + 2], heights[:, -GAP - 3]
    assert (left < 4).all() and right[0] > LANE - 10
    assert right[1] == pytest.approx(right[0] / 2, abs=3)


@pytest.mark.parametrize("samples", [1, 7, 5000])
def test_a_sheet_of_sound_alone_has_the_waveform_only(samples):
    image = Sheet(24).draw(np.ones((samples, 1), np.float32), 24000)
    assert image.shape == (GAP + LANE + LABEL + GAP, COLUMNS * 320 + 2 * GAP, 3)
    lane = (image[GAP:][:LANE] != PAPER).any(-1)
    assert lane.any(0).sum() == COLUMNS * 320


def test_a_sheet_without_sound_or_with_silence():
    made = sheet(25)
    silent = made.draw(np.zeros((4800, 2), np.float32), 24000)
    without = made.draw(None, None)
    assert len(without) == GAP + 3 * (48 + LABEL + GAP)
    assert (silent[: len(without)] == without).all()
    assert (silent[len(without) :] != PAPER).any()


@pytest.mark.parametrize(
    "space, light, shown",
    [("srgb_linear", 0.2140, 128), ("srgb_linear", 7.0, 255), ("acescg", 0.2140, 128)],
)
def test_hdr_is_shown_as_srgb_clipped_at_white(space, light, shown):
    made = Sheet(24, space)
    made.add(np.full((1, 8, 8, 3), light, np.float32), 1, 1)
    ((_, image),) = made.tiles
    assert isinstance(image, Image.Image)
    np.testing.assert_allclose(image.getpixel((0, 0)), shown, atol=1)
