"""The report's page in headless Chromium: what a reader sees and does, and what hostile text must not do."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import pytest
import yaml

from pctrain.report import command as report
from pctrain.report import watch
from tests.helpers.study_folders import STEP_RL, STEP_SFT, binomial_se, config, make_rl, make_sft, make_study, rising
from tests.helpers.watch_server import Serving

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is a test extra")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Each of them sets `hurt` if it runs.
HOSTILE = (
    "</script><script>window.hurt='script'</script><img src=x onerror=\"window.hurt='img'\">"
    "<svg onload=\"window.hurt='svg'\">"
    "<a href=\"javascript:window.hurt='link'\">a link</a>]]>--></textarea></style>{{ 7*7 }} %{x} & ' \" \u2028"
)
HOSTILE_SET = "<img src=x onerror=window.hurt=1> & <b>hard"
CHART = ".chart .main-svg"


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Opened:
    """A page with everything that it said and asked for."""

    def __init__(self, browser, url: str, **context) -> None:
        self.context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | context))
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)
        self.page.wait_for_selector(CHART)

    def data(self, chart: str) -> list[dict]:
        """The traces as plotly holds them."""
        return json.loads(self.page.evaluate(f"JSON.stringify(document.getElementById('chart-{chart}').data)"))

    def named(self, chart: str, name: str) -> dict:
        return next(trace for trace in self.data(chart) if trace.get("name") == name)

    def range(self, chart: str, axis: str = "xaxis") -> list[float]:
        return self.page.evaluate(f"document.getElementById('chart-{chart}')._fullLayout.{axis}.range")

    def until(self, condition: str) -> None:
        """Playwright's own waiting for a condition evaluates strings in the page, which the page's policy forbids."""
        deadline = time.monotonic() + 30
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, condition
            self.page.wait_for_timeout(50)

    def drag(self, chart: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        """From and to shares of the plotting area."""
        area = self.page.locator(f"#chart-{chart} .nsewdrag").first
        area.scroll_into_view_if_needed()
        box = area.bounding_box()
        at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
        self.page.mouse.move(*at[0])
        self.page.mouse.down()
        self.page.mouse.move(*at[1], steps=4)
        self.page.mouse.up()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with hostile text in its name, its config and its rollouts."""
    root = make_study(tmp_path_factory.mktemp("browser") / "a <b onclick=window.hurt=2>study & more", hostile=HOSTILE)
    (root / "sft" / "config.yaml").write_text(yaml.safe_dump(config("sft") | {"note": HOSTILE}))
    return write_page(root)


def write_page(root: Path) -> Path:
    """report.html alone; test_report.py has the pictures, which take their time."""
    (root / "report.html").write_text(report.make(root).page())
    return root


@pytest.fixture(scope="module")
def opened(chromium, folder: Path):
    page = Opened(chromium, (folder / "report.html").as_uri())
    yield page
    page.context.close()


def test_it_opens_from_the_disk_without_a_complaint_or_a_request(opened: Opened) -> None:
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith(("file:", "blob:", "data:"))] == []
    assert len(opened.asked) == 1 and opened.page.title() == "a <b onclick=window.hurt=2>study & more: ceiling report"


def test_every_chart_has_its_points(opened: Opened) -> None:
    assert len(opened.named("validation_loss", "pure SFT")["x"]) == 10
    assert [
        len(opened.named("score_vs_compute", f"RL from step {step}")["x"])
        for step in ("60 (early)", "150 (stable)", "270 (overfit)")
    ] == [26, 26, 6]
    assert len(opened.named("score_vs_compute", "pure SFT")["x"]) == 4
    assert opened.named("ceilings", "P_sft, before RL")["x"] == [20, 45, 50]
    compute = opened.data("compute")
    assert len(compute) == 4 and [len(trace["x"]) for trace in compute] == [7] * 4
    drawn = opened.page.locator("#chart-score_vs_compute .scatterlayer .points path").count()
    assert drawn == 26 + 26 + 6 + 4 + 2  # and two diamonds


def test_hover_shows_the_value(opened: Opened) -> None:
    node = opened.page.locator("#chart-score_vs_compute")
    node.scroll_into_view_if_needed()
    x, y = opened.page.evaluate(
        """() => { const gd = document.getElementById('chart-score_vs_compute'), {xaxis, yaxis} = gd._fullLayout;
        const t = gd.data.find(t => t.name === 'RL from step 270 (overfit)');
        const box = gd.querySelector('.nsewdrag').getBoundingClientRect();
        return [box.x + xaxis.l2p(t.x[3]), box.y + yaxis.l2p(t.y[3])]; }"""
    )
    opened.page.mouse.move(x - 3, y - 3)
    opened.page.mouse.move(x, y)
    opened.page.wait_for_selector("#chart-score_vs_compute .hoverlayer .hovertext")
    hover = opened.page.locator("#chart-score_vs_compute .hoverlayer").text_content()
    assert "RL from step 270 (overfit)" in hover and "RL step 30" in hover
    assert f"63.0% ± {binomial_se(63.0):.1f}" in hover


def test_a_button_of_the_legend_hides_its_run_and_shows_it_again(opened: Opened) -> None:
    chip = opened.page.locator("[data-legend='score_vs_compute'] .chip", has_text="step 150 (stable)")
    traces = opened.page.locator("#chart-score_vs_compute .scatterlayer .trace")
    before = traces.count()
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    assert {
        t["visible"] for t in opened.data("score_vs_compute") if t.get("legendgroup") == "RL from step 150 (stable)"
    } == {False}
    assert traces.count() == before - 5  # points, curve, two ends of the band, diamond
    chip.click()
    assert traces.count() == before


def test_a_drag_zooms_and_reset_goes_back(opened: Opened) -> None:
    whole = opened.range("score_vs_compute")
    opened.drag("score_vs_compute", (0.3, 0.2), (0.5, 0.8))
    low, high = opened.range("score_vs_compute")
    width = whole[1] - whole[0]
    assert abs(low - (whole[0] + 0.3 * width)) < 0.03 * width and abs(high - (whole[0] + 0.5 * width)) < 0.03 * width
    opened.page.locator("[data-action='reset'][data-chart='score_vs_compute']").click()
    opened.page.wait_for_timeout(100)
    assert opened.range("score_vs_compute") == pytest.approx(whole)


def test_held_out_points_are_hollow(opened: Opened) -> None:
    opened.page.get_by_role("button", name="held out").click()
    symbols = opened.named("score_vs_compute", "RL from step 150 (stable)")["marker"]["symbol"]
    assert [s.endswith("-open") for s in symbols] == [False] * 18 + [
        True
    ] * 8  # the start of RL, the first 71% of 25, the rest
    opened.page.get_by_role("button", name="all points").click()
    assert not any(
        s.endswith("-open") for s in opened.named("score_vs_compute", "RL from step 150 (stable)")["marker"]["symbol"]
    )


def test_csv_and_png_of_a_chart(opened: Opened, folder: Path) -> None:
    with opened.page.expect_download() as waiting:
        opened.page.locator("[data-action='csv'][data-chart='score_vs_compute']").click()
    text = Path(waiting.value.path()).read_text()
    assert waiting.value.suggested_filename == "score_vs_compute.csv"
    assert text == next(chart.csv() for chart in report.make(folder).charts if chart.name == "score_vs_compute")
    assert len(text.splitlines()) == 1 + 4 + 26 + 26 + 6
    with opened.page.expect_download() as waiting:
        opened.page.locator("[data-action='png'][data-chart='ceilings']").click()
    assert Path(waiting.value.path()).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert opened.said == []


# ---- hostile text


def test_hostile_text_is_read_and_does_not_run(opened: Opened) -> None:
    page = opened.page
    assert page.evaluate("window.hurt") is None
    assert (
        page.locator("img, main a[href^='javascript'], [onerror], [onclick], [onload], main svg svg script").count()
        == 0
    )
    assert page.locator("script").count() == 3
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    shown = page.locator("#section-rollouts").inner_text()
    assert "<img src=x onerror=\"window.hurt='img'\">" in shown and "{{ 7*7 }}" in shown
    assert "window.hurt='link'" in page.locator("#section-config").inner_text()


def test_the_policy_runs_no_script_but_the_pages_own(opened: Opened) -> None:
    """The second wall: what the escaping might let through one day."""
    opened.page.evaluate(
        """() => { const put = html => document.body.insertAdjacentHTML('beforeend', html);
        put(`<img id=probe src="data:image/png;base64,x" onerror="window.hurt = 'policy'">`);
        const s = document.createElement('script'); s.id = 'probe'; s.textContent = "window.hurt = 'policy'";
        const a = document.createElement('a'); a.id = 'probe'; a.href = "javascript:window.hurt='policy'";
        document.body.append(s, a); a.click(); }"""
    )
    opened.page.wait_for_timeout(200)
    assert opened.page.evaluate("window.hurt") is None
    assert opened.page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')") == "refused"
    assert sum("Content Security Policy" in line for line in opened.said) >= 4
    opened.page.evaluate("document.querySelectorAll('#probe').forEach(node => node.remove())")
    opened.said.clear()


def test_names_of_sets_are_text_in_charts_and_controls(chromium, tmp_path: Path) -> None:
    for name in (HOSTILE_SET, "easy"):
        make_sft(
            tmp_path / "two" / "sets" / name / "sft", {60: 20.0, 150: 45.0, 270: 50.0}, shift=0.1 * (name == "easy")
        )
        make_rl(
            tmp_path / "two" / "sets" / name / "rl-step-150", 150, "stable", rising(45.0, 70.0 + 3 * (name == "easy"))
        )
    two = Opened(chromium, (write_page(tmp_path / "two") / "report.html").as_uri())
    assert (
        two.said == [] and two.page.evaluate("window.hurt") is None and two.page.locator("img, main b b").count() == 0
    )
    assert HOSTILE_SET in two.page.locator("#chart-ceiling_vs_loss").inner_text()
    assert HOSTILE_SET in two.page.locator("[data-controls='score_vs_compute']").inner_text()
    assert len(two.data("ceiling_vs_loss")) == 2 and len(two.data("ceilings")[0]["x"]) == 2
    two.page.locator("[data-controls='ceilings']").get_by_role("button", name="easy").click()
    assert len(two.data("ceilings")[0]["x"]) == 1
    two.context.close()


# ---- light and dark, large and small

CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = v => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const colour = rgba(getComputedStyle(node).backgroundColor);
      if (colour[3] > 200) return colour;
    }
  };
  const ratio = (a, b) => {
    const [light, dark] = [luminance(a), luminance(b)].sort((x, y) => y - x);
    return (light + 0.05) / (dark + 0.05);
  };
  const bad = [];
  for (const node of document.querySelectorAll('body *')) {
    const written = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
    if (!written || !node.offsetParent || node.closest('svg, script, [aria-hidden]')) continue;
    const text = node.textContent.slice(0, 40);
    if (ratio(rgba(getComputedStyle(node).color), behind(node)) < 4.5) bad.push(`${node.className}: ${text}`);
  }
  for (const node of document.querySelectorAll('.chart text')) {
    if (node.closest('.barlayer')) continue;  // on a bar, not on the panel
    const panel = behind(node.closest('figure'));
    if (ratio(rgba(getComputedStyle(node).fill), panel) < 4.5) bad.push(`in a chart: ${node.textContent}`);
  }
  return bad; }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(opened: Opened, scheme: str) -> None:
    opened.page.emulate_media(color_scheme=scheme)
    opened.page.wait_for_timeout(100)
    # Plotly shows a note on a dark ground for some seconds after a zoom, and earlier tests zoom.
    opened.page.wait_for_selector(".notifier-note", state="detached")
    page = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", page)[:3])) < 200) is (scheme == "dark")
    assert opened.page.evaluate(CONTRAST) == []


def test_the_switch_wins_over_the_system_and_is_remembered(opened: Opened) -> None:
    opened.page.emulate_media(color_scheme="light")
    background = "getComputedStyle(document.body).backgroundColor"
    light = opened.page.evaluate(background)
    opened.page.get_by_role("button", name="Dark").click()
    assert opened.page.evaluate(background) != light
    opened.page.reload()
    opened.page.wait_for_selector(CHART)
    assert opened.page.evaluate(background) != light
    opened.page.get_by_role("button", name="Auto").click()
    assert opened.page.evaluate(background) == light


def test_a_phone_scrolls_in_one_direction_only(chromium, folder: Path) -> None:
    phone = Opened(chromium, (folder / "report.html").as_uri(), viewport={"width": 390, "height": 844}, has_touch=True)
    phone.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert phone.page.evaluate("document.documentElement.scrollWidth") == 390
    sticking_out = phone.page.evaluate(
        """[...document.querySelectorAll('body *')].filter(node => !node.closest('.scroll, nav, pre, svg'))
        .filter(node => node.getBoundingClientRect().right > 391).map(node => node.tagName + '.' + node.className)"""
    )
    assert sticking_out == []
    clipped = phone.page.evaluate(
        """[...document.querySelectorAll('.chart')].flatMap(chart => {
          const {left, right} = chart.getBoundingClientRect();
          return [...chart.querySelectorAll('text')].filter(text => {
            const box = text.getBoundingClientRect();
            return text.textContent && (box.right > right + 1 || box.left < left - 1);
          }).map(text => `${chart.id}: ${text.textContent}`);
        })"""
    )
    assert clipped == []
    # A finger that moves over a chart moves the page, until one asks for zoom.
    assert phone.page.evaluate("document.getElementById('chart-score_vs_compute')._fullLayout.dragmode") is False
    phone.page.locator("[data-action='zoom'][data-chart='score_vs_compute']").click()
    assert phone.page.evaluate("document.getElementById('chart-score_vs_compute')._fullLayout.dragmode") == "zoom"
    assert phone.said == []
    phone.context.close()


# ---- while a run continues


def test_the_page_follows_a_run_and_keeps_what_the_reader_chose(
    chromium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(watch, "READING_SHARE", 1e9)
    run = make_study(tmp_path / "study")
    serving = Serving(run)
    live = Opened(chromium, f"http://127.0.0.1:{serving.port}/")
    page = live.page
    try:
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        live.drag("score_vs_compute", (0.3, 0.2), (0.9, 0.8))
        page.locator("[data-legend='score_vs_compute'] .chip", has_text="step 60 (early)").click()
        # The text above the chart may grow or shrink.
        where = "document.getElementById('chart-score_vs_compute').getBoundingClientRect().top"
        zoom, place = live.range("score_vs_compute"), page.evaluate(where)
        row = {
            "step": 60,
            "kind": "eval",
            "eflops_sft": 270 * STEP_SFT,
            "eflops_rl": 60 * STEP_RL,
            "score": 88.8,
            "score_se": 1.0,
        }
        with (run / "rl-step-270" / "metrics.jsonl").open("a") as lines:
            lines.write(json.dumps(row)[:30])
            lines.flush()
            page.wait_for_timeout(500)
            assert len(live.named("score_vs_compute", "RL from step 270 (overfit)")["x"]) == 6
            lines.write(json.dumps(row)[30:] + "\n")
        live.until("document.getElementById('chart-score_vs_compute').data.some(t => t.y.includes(88.8))")
        assert live.range("score_vs_compute") == zoom and page.evaluate(where) == pytest.approx(place, abs=3)
        assert {
            t["visible"] for t in live.data("score_vs_compute") if t["legendgroup"] == "RL from step 60 (early)"
        } == {False}
        assert "88.8%" in page.locator("#section-summary").inner_text() and "live" in page.locator("#live").inner_text()
        assert page.locator("#rollouts-3").get_attribute("open") is not None
        assert live.said == [] and {url.split("/")[2] for url in live.asked} == {f"127.0.0.1:{serving.port}"}
    finally:
        serving.stop()
    live.until("document.getElementById('live').dataset.state === 'gone'")
    live.context.close()
