import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report.records import record

from niwaki.report import drawing, figures
from niwaki.report.drawing import COLOURS, _apart


def curve() -> str:
    return figures.occams_hill([figures.Curve("<gmp> & co", {0.5: [0.9, 0.91], 0.9: [0.89, 0.88]})], [0.9, 0.89])


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("side", ["light", "dark"])
def test_colours_can_be_read_and_seen(side):
    paper, panel = (getattr(COLOURS[role], side) for role in ("paper", "panel"))
    for role in ("ink", "quiet", "first"):  # text, by WCAG's level AA
        assert contrast(getattr(COLOURS[role], side), paper) >= 4.5
        assert contrast(getattr(COLOURS[role], side), panel) >= 4.5
    for role in ("second", "third", "fourth", "fifth", "sixth"):  # parts of figures, and their labels
        assert contrast(getattr(COLOURS[role], side), paper) >= 4.5


def test_the_same_numbers_give_the_same_bytes_and_settings_of_the_user_do_not_matter():
    first = curve()
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": False, "svg.hashsalt": None}):
        assert curve() == first


def test_drawing_changes_no_settings():
    before = dict(matplotlib.rcParams)
    curve()
    assert dict(matplotlib.rcParams) == before


def test_drawing_opens_no_window():
    from matplotlib._pylab_helpers import Gcf

    before = Gcf.get_num_fig_managers()
    curve()
    assert Gcf.get_num_fig_managers() == before


def test_inlined_it_follows_the_page():
    svg = drawing.inline(curve(), 'a "hill" <b>')
    assert "var(--first)" in svg
    assert not re.search(r"#[0-9a-f]{6}\b", svg.lower())
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == 'a "hill" <b>'
    assert root.get("role") == "img"


def test_every_drawing_has_ids_of_its_own():
    drawn = [drawing.inline(svg, "x") for svg in (curve(), figures.losses(record().results.dense_history, [], [], 0.02))]
    ids = [set(re.findall(r'\bid="([^"]*)"', svg)) for svg in drawn]
    assert all(ids)
    assert not ids[0] & ids[1]
    for svg, own in zip(drawn, ids, strict=True):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= own


def test_standing_alone_it_is_light_on_white():
    svg = drawing.standalone(curve())
    root = ElementTree.fromstring(svg.split("\n", 1)[1])
    background = root[0]
    assert background.tag.endswith("rect")
    assert background.get("fill") == "#ffffff"
    assert "var(" not in svg
    assert COLOURS["first"].light in svg
    assert not any(colour.drawn in svg for colour in COLOURS.values())


def test_text_stays_as_it_was_said():
    words = 'v1.23456 id="x" url(#y) $m$'
    svg = figures.occams_hill([figures.Curve(words, {0.5: [0.9]}), figures.Curve("b", {0.5: [0.9]})], [0.9])
    for text in (drawing.inline(svg, "x"), drawing.standalone(svg)[39:]):
        assert words in [element.text for element in ElementTree.fromstring(text).iter()]


@given(st.lists(st.floats(-1, 2), min_size=1, max_size=12), st.floats(0.01, 0.5))
def test_labels_are_moved_apart_in_order_and_no_farther_than_needed(places, gap):
    places = sorted(places)
    moved = _apart(places, gap)
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(moved))
    assert sum(moved) == pytest.approx(sum(places), abs=1e-6)
    if all(b - a >= gap for a, b in pairwise(places)):
        assert moved == pytest.approx(places)


def test_the_sparsity_axis_has_ticks_at_what_was_measured():
    measured = (0.55, 0.81, 0.93, 0.931, 0.97)
    svg = figures.occams_hill([figures.Curve("gmp", {sparsity: [0.9] for sparsity in measured})], [0.9])
    shown = [element.text for element in ElementTree.fromstring(svg).iter() if element.text]
    assert [text in shown for text in ("55", "81", "93", "93.1", "97")] == [True, True, True, False, True]
    assert "90" in shown  # of the accuracy
    assert "95" not in shown


def test_no_seed_is_cut_off():
    svg = figures.occams_hill([figures.Curve("gmp", {0.5: [0.70, 0.80, 0.81], 0.9: [0.77, 0.78]})], [0.78], unit="number")
    root = ElementTree.fromstring(svg)
    frame = next(one for one in root.iter() if one.tag.endswith("rect"))  # what the dots are clipped to
    top, height = (float(frame.get(side)) for side in ("y", "height"))
    marks = [float(one.get("y")) for one in root.iter() if one.tag.endswith("use") and one.get("y")]
    assert len(marks) > 5
    assert all(top - 0.1 <= y <= top + height + 0.1 for y in marks)


@pytest.mark.filterwarnings("error")  # matplotlib warns where a legend leaves no room for the axes
def test_many_series_leave_room_for_the_axes():
    names = [f"a_method_with_a_name_{i}" for i in range(60)]
    hill = figures.occams_hill([figures.Curve(name, {0.5: [0.9], 0.9: [0.89 - 0.01 * i / 60]}) for i, name in enumerate(names)], [0.9])
    points = [figures.Point(name, 10.0 + i, 0.88 + 0.0001 * i, 0.0, on_front=i == 0) for i, name in enumerate(names)]
    trade = figures.trade_off(points, figures.Point("dense", 100.0, 0.9, 0.0, on_front=True), "size", "accuracy", "share")
    for svg in (hill, trade):
        assert all(name in svg for name in names)
