"What a lesson cell can't show about rwkv_peft.show: parsers that aren't ours, and inputs that nobody chose."
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings, strategies as st

from markup import Markup
from rwkv_peft.show.curve import curve, curve_png, curve_svg, decimate, describe, spark, ticks
from rwkv_peft.show.html import Html, escape, page, table, tag, token_ribbon

ANY = st.floats(allow_nan=True, allow_infinity=True)
POINTS = st.lists(st.tuples(ANY, ANY), max_size=700).map(lambda p: ([x for x, _ in p], [y for _, y in p]))


@settings(max_examples=200, deadline=None)
@given(st.text(), st.floats(allow_nan=True), st.text())
def test_any_text_stays_text_in_a_ribbon(text, value, title):
    seen = Markup(token_ribbon([text], [value], [title]))
    clean = text.encode("utf-8", "replace").decode()
    expected = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", clean).replace("\r", "␍").replace("\n", "↵\n") or "∅"
    assert seen.text == expected
    assert seen.tags == ["div", "div", "span" if value == 0 else "u"]


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</table></div><h1>", "&lt;b&gt;", "' onmouseover='x"])
def test_markup_is_text_everywhere(evil):
    html = table([[evil, 1], {"a": evil}.items()], [evil, evil], evil) + token_ribbon([evil], [1], [evil], evil) + tag("p", evil, title=evil) + curve_svg({evil: ([0, 1], [1, 2])}, evil, evil, evil)
    seen = Markup(page(evil, html))
    allowed = {"html", "head", "meta", "title", "style", "body", "table", "caption", "thead", "tbody", "tr", "th", "td", "div", "span", "u", "p", "svg", "text", "line", "polyline", "circle"}
    assert set(seen.tags) <= allowed and seen.tags.count("title") == 2 and evil in seen.values("title")
    assert seen.text.count(evil) >= 8


def test_escape_once_and_joining_is_safe():
    assert escape(Html("<b>")) == "<b>" and escape("<b>") == "&lt;b&gt;" and escape(escape("<b>")) == "&lt;b&gt;"
    assert escape(Html("<b>") + "<i>") == "&lt;b&gt;&lt;i&gt;"          # forgotten wrapping escapes more, never less


def test_lone_surrogates_can_be_written_to_a_file(tmp_path):
    (tmp_path / "r.html").write_text(page("\ud800", tag("p", "\udfff")), encoding="utf-8")


def test_a_page_asks_nothing_of_the_network():
    html = page("t", table({"a": 1}) + curve_svg({"a": ([0, 1], [1, 2])}) + token_ribbon(["a"], [1]))
    assert "//" not in html and "default-src 'none'" in html and "<script" not in html and 'charset="utf-8"' in html
    assert "color-scheme: light dark" in html
    assert not re.search(r"(?<!-)\b(background|color|fill)\s*[:=]\s*\"?(white|black|#fff|#000)", html)      # nothing that one theme would hide


def test_colour_is_not_the_only_sign():
    html = token_ribbon(["a", "b", "c", "d"], [0, 1, -1, math.nan])
    assert [html.count(f"underline {kind}") for kind in ("solid", "dashed", "dotted")] == [1, 1, 1] and html.count("<u ") == 3
    svg = ElementTree.fromstring(curve_svg({n: ([0, 1], [1, 2]) for n in "abcde"}))
    assert len({line.get("stroke-dasharray") for line in svg.iter("polyline")}) == 5


def test_ribbon_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="2 pieces, 1 values"): token_ribbon(["a", "b"], [1])
    with pytest.raises(ValueError, match="1 titles"): token_ribbon(["a", "b"], [1, 1], ["x"])


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text("ab <>&'\"好😀", max_size=5), POINTS, max_size=3))
def test_any_series_gives_well_formed_svg_inside_its_frame(series):
    root = ElementTree.fromstring(curve_svg(series))
    assert root.get("role") == "img" and root.find("title").text == root.get("aria-label") == describe(series)
    drawn = 0
    for line in root.iter("polyline"):
        points = [tuple(map(float, p.split(","))) for p in line.get("points").split()]
        drawn += len(points)
        assert all(0 <= x <= 640 and 0 <= y <= 240 for x, y in points)
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter("circle")]
    assert all(0 <= x <= 640 and 0 <= y <= 240 for x, y in dots)
    assert drawn + len(dots) <= 300 * len(series)
    finite = sum(math.isfinite(x) and math.isfinite(y) for xs, ys in series.values() for x, y in zip(*decimate(xs, ys)))
    assert drawn + len(dots) == finite


def pixels(text, size=11):
    "The width of `text` in a real font."
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath
    return TextPath((0, 0), text, size=size, prop=FontProperties(family="DejaVu Sans")).get_extents().width


LONG = [f"learning rate {i}e-4, the second try of the evening" for i in range(1, 7)]


@pytest.mark.parametrize("names, y, last", [(["training", "held out"], "loss", 20_000), (LONG, "loss", 900_000), (LONG[:3], "loss in nats for each trained token", 100), (["x" * 200], "loss", 5)])
def test_no_word_of_the_curve_lies_on_another_or_on_a_line_or_leaves_the_frame(names, y, last):
    root = ElementTree.fromstring(curve_svg({name: ([0, last], [2, 2 + i]) for i, name in enumerate(names)}, y=y))
    width, height = int(root.get("width")), int(root.get("height"))
    boxes = []
    for t in root.iter("text"):
        x, base, wide = float(t.get("x")), float(t.get("y")), pixels(t.text)
        x -= {"middle": wide / 2, "end": wide}.get(t.get("text-anchor"), 0)
        boxes.append((x, x + wide, base - 9, base + 2))
    assert all(0 <= x0 and x1 <= width + 1 and 0 <= top and low <= height for x0, x1, top, low in boxes), boxes
    for i, a in enumerate(boxes):
        assert not any(a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3] for b in boxes[:i]), a
    lines = [float(p.split(",")[1]) for line in root.iter("polyline") for p in line.get("points").split()]
    legend = [float(t.get("y")) for t in root.iter("text") if t.text[:10] in [n[:10] for n in names]]
    assert len(legend) == len(names) and max(legend) < min(lines)


@pytest.mark.parametrize("n, title", [(1, None), (2, "a title"), (6, None)])
def test_the_legend_of_the_png_stands_above_the_axes(n, title):
    "Two pictures that differ in their names only differ above the vertical axis only."
    import io
    import numpy as np
    from PIL import Image
    draw = lambda letter: np.asarray(Image.open(io.BytesIO(curve_png({f"{letter}{i}": ([0, 1, 2], [0, i, 9]) for i in range(n)}, title=title))).getchannel("A")).astype(int)      # drawn on nothing
    a, b = draw("a"), draw("o")
    dark = a > 195
    axis = np.flatnonzero(dark[:, dark.sum(0).argmax()])
    changed = np.flatnonzero((a != b).any(1))
    assert len(changed) and changed.max() < axis.min() and axis.max() - axis.min() > 100


def test_dollars_are_not_typeset():
    "MathJax leaves an element with one of these classes alone, with all that is in it; no data may stand outside of one."
    class Outside(HTMLParser):
        def __init__(self, html):
            super().__init__()
            self.open, self.found = [], ""
            self.feed(html)
        def handle_starttag(self, name, attributes): self.open.append(dict(attributes).get("class") or "")
        def handle_endtag(self, name): self.open.pop()
        def handle_data(self, data): self.found += data if not any({"tex2jax_ignore", "mathjax_ignore"} <= set(c.split()) for c in self.open) else ""
    text = "from $5 to $9"
    for html in (token_ribbon([text], [1], legend=text), table([[text]], [text], text), curve_svg({text: ([0, 1], [1, 2])}, text, text)):
        assert text in html and not Outside(html).found


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=2000), st.integers(4, 300))
def test_decimation_keeps_extremes_ends_and_order(ys, points):
    xs, kept = decimate(range(len(ys)), ys, points)
    assert len(xs) <= points and xs == sorted(set(xs)) and all(ys[int(x)] == y for x, y in zip(xs, kept))
    assert (min(kept), max(kept), xs[0], xs[-1]) == (min(ys), max(ys), 0, len(ys) - 1)


def test_decimation_keeps_a_gap():
    ys = [1.0] * 5000
    ys[3333] = math.nan
    assert sum(map(math.isnan, decimate(range(5000), ys)[1])) == 1


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e12))
@example(3602879702.7265625, 1e-06)
def test_ticks_are_inside_and_evenly_spaced(low, width):
    high = low + width
    found = ticks(low, high)
    assert 1 <= len(found) <= 7
    room = 1e-6 * max(abs(low), abs(high), width)
    assert all(low - room <= t <= high + room for t in found)


@pytest.mark.parametrize("width", [5e-324, 2e-323, 1e-310, 1e-301, 1e-299])
def test_numbers_too_close_to_divide_are_drawn_as_one(width):
    assert len(ticks(0, width)) <= 7
    for series in ({"a": ([0, 1], [0, width])}, {"a": ([0, width], [0, 1])}, {"a": ([0, width], [-width, width])}): assert "nan" not in curve(series, title="t") and curve_png(series)


@pytest.mark.parametrize("series", [{}, {"a": ([], [])}, {"a": ([1], [1])}, {"a": ([1, 2], [math.nan, math.inf])}, {"a": ([0, 1], [1e308, -1e308])}, {"$x$ _": (range(9), range(9))}])
def test_png_of_odd_series(series):
    png = curve_png(series, title="a $ b")
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(png[16:20], "big") == 640


def test_png_leaves_pyplot_alone():
    code = "import sys; from rwkv_peft.show.curve import curve_png; assert 'matplotlib' not in sys.modules; curve_png({'a': ([0, 1], [1, 2])}); assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_spark():
    assert spark([0, 7]) == "▁█" and spark([math.nan, math.inf, 1, -1]) == "··█▁"
