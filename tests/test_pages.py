"""Pages of show and run: parsed as HTML, numbers compared with the facts, nothing of it runs."""

import json
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from command_line import m2c, m2c_ok
from running import MIXES, budgets, options_for, plan_of, smallest_dram

from m2c.bundle.bundle import Bundle
from m2c.pages import html
from m2c.pages.run_page import run_page
from m2c.pages.svg import Axis, Bar, Line, bar_chart, line_chart, number, share_ticks
from m2c.tiers.parts import tier_parts

HOSTILE = "</pre><script>alert('x')</script><img src=x onerror=alert(1)>&amp;\"\x00\x1b[31m"
VOID = {"meta", "line", "polyline", "circle", "rect", "img", "br", "link"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    text: str = ""
    children: list["Element"] = field(default_factory=list)

    def all(self, tag: str) -> list["Element"]:
        own = [self] if self.tag == tag else []
        return own + [found for child in self.children for found in child.all(tag)]

    @property
    def words(self) -> str:
        return " ".join([self.text, *(child.words for child in self.children)]).strip()


class Tree(HTMLParser):
    """Elements as written; an end tag that does not fit is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("document", {})
        self._open = [self.root]
        self.feed(text)
        self.close()
        assert self._open == [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self._open[-1].children.append(element)
        if tag != "meta":
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self._open[-1].text += data


def parsed(page: bytes | Path) -> Element:
    """The page, known to load and run nothing."""
    text = (page.read_bytes() if isinstance(page, Path) else page).decode()
    root = Tree(text).root
    tags = {element.tag for name in ("script", "img", "link", "iframe", "object", "base", "form")
            for element in root.all(name)}  # fmt: skip
    assert not tags
    assert not {a for e in everything(root) for a in e.attributes if a.startswith("on")}
    assert not {a for e in everything(root) for a in e.attributes if a in ("href", "src", "style")}
    assert "url(" not in text
    (policy,) = [m.attributes["content"] for m in root.all("meta")
                 if m.attributes.get("http-equiv") == "Content-Security-Policy"]  # fmt: skip
    assert policy == html.POLICY
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    return root


def everything(element: Element) -> list[Element]:
    return [element] + [found for child in element.children for found in everything(child)]


def rows(root: Element) -> list[list[str]]:
    """Cells of all rows of all tables."""
    return [
        [cell.words for cell in row.children if cell.tag in ("td", "th")] for row in root.all("tr")
    ]


# -- charts and pages ------------------------------------------------------------------------------


def test_a_line_lies_where_its_numbers_say() -> None:
    chart = Tree(
        line_chart(
            [Line("one", [0, 50, 100], [0, 25, 100]), Line("two <b>", [0, 100], [100, 0])],
            Axis("x, %", high=100), Axis("y, ms", high=100), title='a "chart"',
        )
    ).root  # fmt: skip
    one, two = (line.attributes["points"] for line in chart.all("polyline"))
    (left, bottom), (middle, quarter), (right, top) = (
        tuple(map(float, pair.split(","))) for pair in str(one).split()
    )
    assert middle == pytest.approx((left + right) / 2, abs=0.1)
    assert quarter == pytest.approx(bottom + (top - bottom) / 4, abs=0.1)
    assert str(two).split() == [f"{left:g},{top:g}", f"{right:g},{bottom:g}"]
    texts = [text.text for text in chart.all("text")]
    assert {"0", "20", "100", "x, %", "y, ms"} <= set(texts)
    assert [item.words for item in chart.all("li")] == ["one", "two <b>"]
    assert chart.all("svg")[0].attributes["aria-label"] == 'a "chart"'
    assert chart.all("circle")[1].words == "one: 25 at 50"


def test_bars_are_as_long_as_their_parts() -> None:
    chart = Tree(
        bar_chart([Bar("a", {"x": 10, "y": 30}, "40 B", 80), Bar("b", {"y": 20}, "20 B")],
                  Axis("size, B"), title="bars")
    ).root  # fmt: skip
    by_class: dict[str, list[float]] = {}
    for rect in chart.all("rect"):
        if rect.attributes["height"] == "18":
            width = float(str(rect.attributes["width"]))
            by_class.setdefault(str(rect.attributes["class"]), []).append(width)
    assert by_class["f2"] == pytest.approx([3 * by_class["f1"][0], 2 * by_class["f1"][0]], rel=0.01)
    assert by_class["room"][0] == pytest.approx(8 * by_class["f1"][0], rel=0.01)


@pytest.mark.parametrize("values", [[], [0.0], [0.0, 0.0], [1e-9], [5.0] * 3000, [1e12, 1.0]])
@pytest.mark.parametrize("log", [False, True])
def test_odd_values_make_charts_too(values: list[float], log: bool) -> None:
    lines = [Line("a", range(len(values)), values)]
    text = line_chart(lines, Axis("x"), Axis("y", log=log), title="t")
    assert "nan" not in text
    assert "inf" not in text
    assert len(text) < 20_000
    Tree(text)


def test_ticks_are_round_and_few() -> None:
    assert share_ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    for high in (0.003, 0.7, 1, 3.3, 9, 12, 29, 130, 1.7e9):
        ticks = share_ticks(0, high)
        assert 4 <= len(ticks) <= 7
        assert ticks[-1] <= high * 1.0001
    assert [number(v) for v in (0, 0.25, 33.333, 1234.5, 5e-5, 2e9)] == [
        "0", "0.25", "33.3", "1234", "5e-5", "2e9",
    ]  # fmt: skip


def test_words_from_outside_stay_words() -> None:
    root = parsed(html.page(HOSTILE, HOSTILE, [html.section(HOSTILE, html.quoted(HOSTILE))],
                            created="today"))  # fmt: skip
    shown = HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")
    assert root.all("pre")[0].words == shown
    assert root.all("title")[0].words == root.all("h1")[0].words == shown
    assert "\ufffd" in html.escape("\ud800")
    assert html.escape("a\u200db e\u0301 \u05d0") == "a\u200db e\u0301 \u05d0"


@pytest.mark.parametrize("mix", ["5/15/80", "0/0/100"])
@pytest.mark.parametrize("hbm", [0, 1 << 26])
def test_the_parts_of_a_tier_add_up_to_what_the_plan_uses(
    deep_bundle: Bundle, mix: str, hbm: int
) -> None:
    options = options_for(MIXES[mix], hbm=hbm)
    plans = [plan_of(deep_bundle, options_for(MIXES[mix], hbm=hbm, dram=dram))
             for dram in budgets(deep_bundle, options)]  # fmt: skip
    for plan in plans:
        used = {tier["name"]: sum(tier["parts"].values()) for tier in tier_parts(plan)}
        expected = {"DRAM": plan.used_dram} | ({"HBM": plan.used_hbm} if hbm else {})
        assert used == expected


# -- m2c show --html -------------------------------------------------------------------------------


def test_the_page_of_a_bundle(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "show.html"
    facts = json.loads(m2c_ok("show", bundle, "--json", "--html", path))
    root = parsed(path)
    assert [h.words for h in root.all("h2")] == [
        "What a few neurons hold", "Layer by layer", "Sizes by plane", "The plan for this machine",
    ]  # fmt: skip
    found = {row[0]: row[1:] for row in rows(root)}
    int4 = facts["planes"]["int4"]
    assert found["INT4"] == [f"{n / 1024:.2f} KiB" for n in (*int4.values(), sum(int4.values()))]
    held = facts["layers"][1]["coverage_own"]
    assert found["1"][:3] == [f"{100 * held[k]:.0f} %" for k in ("10", "30", "50")]
    plans = [figure.words for figure in root.all("figure") if "mode" in figure.all("h3")[0].words]
    assert len(plans) == 2
    assert all("of KV cache" in words for words in plans)


def test_the_page_of_a_profile(tiny_checkpoint: Path, tmp_path: Path) -> None:
    profile = m2c_ok("profile", tiny_checkpoint, "--tokens", 64).strip()
    path = tmp_path / "profile.html"
    m2c_ok("show", profile, "--html", path)
    root = parsed(path)
    assert [h.words for h in root.all("h2")] == ["What a few neurons hold", "Layer by layer"]
    assert len(root.all("polyline")) == 4 + 2 + 4 + 2


# -- m2c run --report ------------------------------------------------------------------------------


def reports(bundle: Path, folder: Path, *options: object) -> tuple[dict[str, Any], Element]:
    """The facts of a run, and the page that is made of them."""
    said = m2c("run", bundle, "-p", HOSTILE.replace("\x00", ""), "-n", 12, *options, "--report",
               folder / "run.json", "--threads", 1)  # fmt: skip
    assert said.code == 0, said.err
    facts = json.loads((folder / "run.json").read_bytes())
    return facts, parsed(run_page(facts))


def test_the_report_of_a_mixed_run(deep_bundle: Bundle, tmp_path: Path) -> None:
    smallest = smallest_dram(deep_bundle, options_for(MIXES["5/15/80"], ctx_size=128))
    dram = f"{(smallest >> 20) + 1}MiB"
    facts, root = reports(
        deep_bundle.path, tmp_path, "--mix", "5/15/80", "-c", 128, "--dram", dram,
        "--stats", tmp_path / "stats.json",
    )  # fmt: skip
    stats = json.loads((tmp_path / "stats.json").read_bytes())
    tokens = facts["tokens"]
    steps = stats["generated_tokens"] - 1
    assert len(tokens["seconds"]) == len(tokens["ssd_nbytes"]) == steps > 0
    assert sum(tokens["seconds"]) == pytest.approx(steps / stats["decode_tps"])
    # what arrives after the last token is in the run's total only
    assert 0 < sum(tokens["ssd_nbytes"]) <= stats["ssd_nbytes_per_token"] * steps + 1
    for plane, served in tokens["upgrades"].items():
        totals = {tier: sum(counts) for tier, counts in served.items()}
        assert totals == stats["upgrades"][plane]
    each = zip(*tokens["upgrades"]["int8"].values(), strict=True)
    assert {sum(counts) for counts in each} == {8 * 105}  # layers, 15 % of 700 neurons
    found = {row[0]: row[1:] for row in rows(root)}
    assert found["SSD, decoding"][0] == f"{number(sum(tokens['ssd_nbytes']) / 1e6)} MB"
    assert found["mix"] == ["5/15/80"]
    figures = {f.all("h3")[0].words: f for f in root.all("figure")}
    assert figures["Prompt"].all("pre")[0].words == facts["prompt"].replace("\x1b", "\ufffd")
    assert figures["Answer"].all("pre")[0].words == html_text(facts["answer"])
    assert "INT8 plane" in figures
    cards = root.all("ul")[0].words
    assert f"{number(stats['decode_tps'])} tok/s" in cards


def html_text(text: str) -> str:
    """What a reader sees of a text that was escaped."""
    return Tree(f"<p>{html.escape(text)}</p>").root.all("p")[0].words


def test_the_report_of_an_exact_run_has_its_passes(bundle: Path, tmp_path: Path) -> None:
    facts, root = reports(bundle, tmp_path, "--mode", "exact", "-n", 40)
    passes, speculation = facts["passes"], facts["run"]["speculation"]
    assert len(passes) == speculation["passes"] > 0
    for key in ("drafted", "accepted"):
        assert sum(found[key] for found in passes) == speculation[key]
    assert sum(found["accepted"] + 1 for found in passes) >= len(facts["tokens"]["seconds"])
    assert [h.words for h in root.all("h2")][3] == "Drafts and passes"
    assert "Nothing was fetched by neuron or by expert" in root.words


def test_a_run_of_one_token_has_a_report(bundle: Path, tmp_path: Path) -> None:
    for mode in ("mixed", "exact"):
        facts, root = reports(bundle, tmp_path, "--mode", mode, "-n", 1)
        assert facts["tokens"]["seconds"] == []
        assert "Only one token was generated." in root.words


# -- where pages may go ----------------------------------------------------------------------------


def test_only_pages_of_ours_are_overwritten(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    for _ in range(2):
        m2c_ok("show", bundle, "--html", path)
        m2c_ok("run", bundle, "-q", "-p", "x", "-n", 2, "--report", path)
    path.write_text("my own notes")
    for words in (("show", bundle, "--html"), ("run", bundle, "-p", "x", "--report")):
        said = m2c(*words, path)
        assert said.code == 4
        assert said.reason.endswith(
            "page.html: is there already and no report of m2c; give another name, or remove it"
        )
    assert path.read_text() == "my own notes"
    data = tmp_path / "r.json"
    m2c_ok("run", bundle, "-q", "-p", "x", "-n", 2, "--report", data)
    m2c_ok("run", bundle, "-q", "-p", "x", "-n", 2, "--report", data)


@pytest.mark.parametrize(("words", "code", "reason"), [
    (("show", "--html", "page"), 2, "--html page: must end in .html"),
    (("show", "--html", "profile.safetensors"), 2, "--html profile.safetensors: must end in .html"),
    (("show", "--html", "no/page.html"), 4, "--html no/page.html: no such folder"),
    (("run", "-p", "x", "--report", "r.txt"), 2, "--report r.txt: must end in .html or .json"),
])  # fmt: skip
def test_where_a_page_cannot_go(words: tuple[str, ...], code: int, reason: str) -> None:
    said = m2c(*words)
    assert (said.code, said.reason[: len(reason)]) == (code, reason)


# -- a browser -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_browser_shows_the_pages_and_finds_no_fault(bundle: Path, tmp_path: Path) -> None:
    """The policy blocks nothing that is there, and what a prompt holds does not run."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    page, prompt = tmp_path / "run.html", "<script>document.title='broken'</script>"
    m2c_ok("run", bundle, "-q", "-p", prompt, "-n", 8, "--mix", "5/15/80", "--report", page)
    done = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Content Security Policy" not in done.stderr
    root = Tree(done.stdout).root
    assert root.all("title")[0].words.endswith(": a run")
    assert prompt in [pre.words for pre in root.all("pre")]
    assert not root.all("script")
