"""The page for people: what it says, and that a real browser shows it."""

import re
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import pytest

from tests.support.worker_samples import BEGAN, Ticks, sample_sweep, sample_vitals
from worker.service.endpoints import web_server
from worker.service.health import Health, State
from worker.service.metrics import Metrics
from worker.service.status_page import SHOWN_SWEEPS, judge, render, span

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# A page and nothing else: no sandbox, for tests run as root in containers; no calls home.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
GREEN_BY_DAY, GREEN_AT_NIGHT = (0x1A, 0x7F, 0x4B), (0x56, 0xC9, 0x8D)


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()


@pytest.fixture
def health(ticks: Ticks) -> Health:
    health = sample_vitals(ticks)
    health.enter("working")
    return health


def swept(health: Health) -> None:
    health.set_lease(True)
    health.set_rows(users=29_981)
    health.sweep_finished(sample_sweep(1, inserted=300, users=29_900))
    health.sweep_finished(sample_sweep(2, inserted=60, updated=15, users=29_960))
    health.sweep_finished(sample_sweep(3, users=29_981))
    health.poll_finished()


def headline(health: Health) -> tuple[str, str]:
    verdict = judge(health.read())
    return verdict.tone, verdict.headline


def page(health: Health) -> str:
    return render(health.read())


def test_page_of_a_worker_that_did_nothing_yet(health: Health) -> None:
    html = page(health)
    assert "<title>Starting · users-sync</title>" in html
    assert "None has ended yet." in html
    assert "unknown" in html


def test_fresh_worker_is_up_to_date(health: Health, ticks: Ticks) -> None:
    swept(health)
    ticks.seconds = 12
    assert headline(health) == ("ok", "Up to date")
    assert "ended 12 s ago. The table holds 29,981 users." in page(health)


def test_sweep_too_long_ago_is_out_of_date(health: Health, ticks: Ticks) -> None:
    swept(health)
    ticks.seconds = 412
    assert headline(health) == ("bad", "Out of date")
    assert "ended 6 min 52 s ago; more than 5 min is too long." in page(health)


def test_replaced_table_is_out_of_date_until_a_complete_sweep(health: Health) -> None:
    swept(health)
    health.table_replaced()
    replaced, html = headline(health), page(health)
    health.sweep_finished(sample_sweep(4, users=29_981))
    assert (replaced, headline(health)) == (("bad", "Out of date"), ("ok", "Up to date"))
    lead = "The table was replaced, or lost rows. The next complete sweep puts it right."
    assert lead in html


def test_trouble_that_may_pass_is_a_warning(health: Health, ticks: Ticks) -> None:
    swept(health)
    health.trouble("Stack Auth answers 500")
    ticks.seconds = 75
    assert headline(health) == ("warn", "Up to date so far")
    assert "<h2>Trouble for 1 min 15 s</h2><p>Stack Auth answers 500</p>" in page(health)


def test_held_deletions_come_with_the_commands(health: Health) -> None:
    health.sweep_finished(sample_sweep(194, "held", held=640))
    health.set_deletions(held=640, candidates=0, oldest_candidate_since=None)
    assert headline(health) == ("warn", "Deletions held")
    assert "640 held deletions" in page(health)
    assert "<pre>users-sync deletions\nusers-sync deletions approve 194</pre>" in page(health)


def test_held_deletions_of_a_forgotten_sweep_leave_its_number_open(health: Health) -> None:
    health.set_deletions(held=1, candidates=0, oldest_candidate_since=None)
    assert "1 held deletion<" in page(health)
    assert "users-sync deletions approve SWEEP" in page(health)


@pytest.mark.parametrize(
    ("state", "verdict"),
    [
        ("working", ("bad", "Needs a person")),
        ("standing by", ("bad", "Needs a person")),
        ("stopping", ("idle", "Stopping")),
    ],
)
def test_fatal_trouble_needs_a_person(
    health: Health, state: State, verdict: tuple[str, str]
) -> None:
    swept(health)
    health.enter(state)
    health.trouble("the key is refused", fatal=True)
    assert headline(health) == verdict


def test_standby_is_no_worry(health: Health, ticks: Ticks) -> None:
    health.enter("standing by")
    ticks.seconds = 90_000
    assert headline(health) == ("idle", "Standing by")
    assert "standing by, up 1 d 1 h" in page(health)


def test_suspicions_tell_their_age(health: Health, ticks: Ticks) -> None:
    health.set_deletions(held=0, candidates=37, oldest_candidate_since=ticks.monotonic())
    ticks.seconds = 117
    assert "37 <small>for 1 min 57 s</small>" in page(health)


def test_bars_are_as_long_as_changes_are_many(health: Health) -> None:
    swept(health)
    bars = re.findall(r'<i class="(\w+)" style="width:([\d.]+)%">', page(health))
    assert bars == [("inserted", "20.00"), ("updated", "5.00"), ("inserted", "100.00")]


def test_approved_deletions_are_deletions(health: Health) -> None:
    health.sweep_finished(sample_sweep(deleted=2, approved=600))
    assert "602 deleted" in page(health)


def test_sweep_says_when_and_how_it_ended(health: Health, ticks: Ticks) -> None:
    audit = sample_sweep(7, "incomplete", took=75, at=BEGAN - timedelta(days=1))
    health.sweep_finished(replace(audit, kind="audit"))
    cells = re.findall(r"<td class=.*?>(.*?)</td>", page(health))
    expected = ["7 audit", "13 Mar 13:37", '<div class="words">no change</div>', "0"]
    assert cells == [*expected, "1 min 15 s", "incomplete"]


def test_only_the_newest_sweeps_are_shown(health: Health) -> None:
    for number in range(1, 41):
        health.sweep_finished(sample_sweep(number))
    assert page(health).count("<tr><td") == SHOWN_SWEEPS


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (9.97, "10 s"),
        (59.6, "1 min"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (3605, "1 h"),
        (90_000, "1 d 1 h"),
    ],
)
def test_lengths_of_time_are_told_in_two_units(seconds: float, words: str) -> None:
    assert span(seconds) == words


def test_page_is_made_of_text_only(ticks: Ticks) -> None:
    health = replace(sample_vitals(ticks), target="<b>&", api_host='"><script>', version="<i>")
    health.trouble("<img src=x>")
    health.sweep_finished(replace(sample_sweep(), kind="<u>", outcome="<s>"))
    html = page(health)
    assert not re.search("<(script|img|b>&|u>|s>)|1.2.3", html)
    assert "&lt;img src=x&gt;" in html


def test_page_has_no_scripts_and_no_outside_parts(health: Health) -> None:
    swept(health)
    html = page(health)
    assert not re.search(r"<script|<link|@import|url\(|https?://| on\w+=", html)
    assert set(re.findall('(?:href|src)="(.*?)"', html)) == {"/healthz", "/readyz", "/metrics"}


@dataclass(frozen=True)
class Browser:
    """A headless browser, with a profile that it forgets."""

    program: str
    folder: Path

    def visit(self, url: str, *flags: str) -> str:
        """Open a page, and return what is in the document in the end."""
        command = [self.program, *FLAGS, f"--user-data-dir={self.folder}", *flags, url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    return Browser(program, tmp_path_factory.mktemp("profile"))


@pytest.fixture
def url(health: Health) -> Iterator[str]:
    swept(health)
    with web_server("127.0.0.1", 0, health, Metrics(health.read)) as server:
        yield f"http://127.0.0.1:{server.port}/"


def test_browser_finds_verdict_and_bars(browser: Browser, url: str) -> None:
    document = browser.visit(url, "--dump-dom")
    assert "<title>Up to date · users-sync</title>" in document
    assert "<h1>Up to date</h1>" in document
    assert document.count('<div class="bar"') == 2


@pytest.mark.parametrize(
    ("flags", "colour"),
    [
        (["--window-size=1000,1200"], GREEN_BY_DAY),
        (["--window-size=400,1200"], GREEN_BY_DAY),
        (["--window-size=1000,1200", "--blink-settings=preferredColorScheme=0"], GREEN_AT_NIGHT),
    ],
    ids=["wide", "narrow", "dark"],
)
def test_browser_shows_the_verdict_in_its_colour(
    browser: Browser, url: str, tmp_path: Path, flags: list[str], colour: tuple[int, int, int]
) -> None:
    screenshot = tmp_path / "page.png"
    browser.visit(url, *flags, f"--screenshot={screenshot}")
    lines = scanlines(screenshot.read_bytes())
    assert tuple(lines[0][1:4]) == colour  # of the rule on top; the style sheet was let in
    assert len(set(lines)) > 100  # a blank page repeats its lines


def scanlines(png: bytes) -> list[bytes]:
    """Return the lines of a picture, each its filter's number, then 8 bits a channel, filtered.

    The first pixel of the first line is as it is, for every filter guesses from what came before.
    """
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    packed, at = b"", 8
    while at < len(png):
        length, kind = int.from_bytes(png[at : at + 4], "big"), png[at + 4 : at + 8]
        packed += png[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += length + 12
    raw = zlib.decompress(packed)
    step = len(raw) // height
    assert step in {1 + 3 * width, 1 + 4 * width}
    return [raw[start : start + step] for start in range(0, len(raw), step)]
