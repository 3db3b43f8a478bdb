"""The pages in a real browser: headless Chromium, where there is one."""

import csv
import html as markup
import io
import json
import re
import shutil
import subprocess
from urllib.parse import unquote

import pytest
from report.reading import Page
from report.records import record, sweep

from niwaki.report import comparison_report, run_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found: chromium, chromium-browser, google-chrome or chrome")

PHONE = 360
AWKWARD = ('says "no"', "a,b", "line\nbreak", "<b>", "'", "ü×", "plain")

# The page stands in a frame as wide as a phone; what it measures there ends up in the frame's parent, which is then dumped.
PROBE = """<!DOCTYPE html><meta charset="utf-8"><body>
<iframe id=frame style="border:0;width:%dpx;height:2000px" srcdoc="%s"></iframe><pre id=found></pre>
<script>
const frame = document.getElementById("frame");
frame.addEventListener("load", () => {
  const page = frame.contentDocument, view = frame.contentWindow;
  for (const one of page.querySelectorAll("details")) one.open = true;
  const ground = () => view.getComputedStyle(page.body).backgroundColor;
  const line = () => view.getComputedStyle(page.querySelector("figure svg [style*='stroke: var(--first)']")).stroke;
  const button = page.getElementById("colours");
  const looks = [[ground(), line(), button.textContent]];
  for (let i = 0; i < 2; i++) { button.click(); looks.push([ground(), line(), button.textContent]); }
  const tables = Object.fromEntries(Array.from(page.querySelectorAll("table"), (t) => [t.id, t.querySelector("a.csv").href]));
  const names = Array.from(page.querySelectorAll("a.csv"), (a) => a.download);
  const outside = Array.from(page.querySelectorAll("figure, .table, pre, dl, h1, h2, p, summary"))
    .filter((e) => e.getBoundingClientRect().right > view.innerWidth + 0.5).length;
  const sizes = Array.from(page.querySelectorAll("figure svg text"), (t) => t.getBoundingClientRect().height);
  document.getElementById("found").textContent = JSON.stringify({
    width: view.innerWidth, scroll: page.documentElement.scrollWidth, looks, tables, names, outside, smallest: Math.min(...sizes),
  });
});
</script>"""


def chromium(folder, page: str, *options: str) -> tuple[str, str]:
    """Open a page from a file, and return its document when all is done, and what the browser logged."""
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--log-level=0",
            f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=4000", "--dump-dom", *options, path.as_uri(),
        ],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    return done.stdout, done.stderr


def probed(folder, page: str) -> tuple[dict, list[str]]:
    """Return what the probe found, and the lines of the console."""
    dom, log = chromium(folder, PROBE % (PHONE, markup.escape(page)))
    found = re.search(r"<pre id=\"found\">(.+?)</pre>", dom, flags=re.DOTALL)
    assert found, dom[-500:]
    return json.loads(markup.unescape(found[1])), [line for line in log.splitlines() if "CONSOLE" in line]


def pages() -> dict[str, str]:
    names = AWKWARD[:4]
    return {"run": run_report(record(class_names=names, epochs=2)), "comparison": comparison_report([*sweep()[:5], ('a,"b"', record())])}


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict[str, tuple[str, dict, list[str]]]:
    return {name: (page, *probed(tmp_path_factory.mktemp(name), page)) for name, page in pages().items()}


@pytest.mark.parametrize("name", ["run", "comparison"])
def test_the_console_stays_silent(shown, name):
    assert shown[name][2] == []


def test_the_console_is_heard(tmp_path):
    page = run_report(record(epochs=1, classes=False, latency=False))
    broken = page.replace("</body>", "<script>alert(1)</script><img src='http://127.0.0.1:9/x.png'></body>")
    found = probed(tmp_path, broken)[1]
    assert any("Content Security Policy" in line and "script" in line for line in found)  # a script that slipped in would not run
    assert any("Content Security Policy" in line and "127.0.0.1" in line for line in found)  # nor would anything be fetched


@pytest.mark.parametrize("name", ["run", "comparison"])
def test_on_a_phone_nothing_is_wider_than_the_screen(shown, name):
    _, found, _ = shown[name]
    assert found["width"] == PHONE
    assert found["scroll"] <= PHONE
    assert found["outside"] == 0
    assert found["smallest"] > 8  # CSS pixels, the height of the smallest text in a figure


@pytest.mark.parametrize("name", ["run", "comparison"])
def test_light_and_dark_can_be_switched(shown, name):
    _, found, _ = shown[name]
    first, second, third = found["looks"]
    assert first == third
    assert {one[0] for one in (first, second)} == {"rgb(255, 255, 255)", "rgb(20, 23, 26)"}
    assert first[1] != second[1]
    assert {first[2], second[2]} == {"Dark colours", "Light colours"}


@pytest.mark.parametrize("name", ["run", "comparison"])
def test_every_table_is_saved_as_csv_with_all_its_digits(shown, name):
    page, found, _ = shown[name]
    tables = Page(page).tables
    assert set(found["tables"]) == set(tables)
    assert sorted(found["names"]) == sorted(f"{table}.csv" for table in tables)
    for table, rows in tables.items():
        text = unquote(found["tables"][table].removeprefix("data:text/csv;charset=utf-8,"))
        read = list(csv.reader(io.StringIO(text, newline=""), strict=True))
        assert read == [[cell.strip() if value is None else value for cell, value in row] for row in rows]


def test_awkward_names_survive_in_csv(shown):
    text = unquote(shown["run"][1]["tables"]["classes"].removeprefix("data:text/csv;charset=utf-8,"))
    assert [row[0] for row in csv.reader(io.StringIO(text, newline=""))][1:] == list(AWKWARD[:4])
