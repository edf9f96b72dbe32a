"""Draws the dashboard of a worker that meets trouble: `python -m tests.bench.panels FILE.svg`.

Six minutes of a real worker between the fake users API and a real Postgres, read by a real
Prometheus once a second; then every panel of ops/grafana.json, from its own expressions. Needs
`prometheus` on the PATH, and matplotlib, which the project does without otherwise.
"""

import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import psycopg

from tests.bench.postgres import opened_server
from tests.bench.troubled_day import SECONDS, Day, Trouble, live, troubles
from tests.support.places import ROOT
from tests.support.ports import free_port
from tests.support.processes import Site, opened_site
from tests.support.waiting import until

USERS = 3_000

# More often than by default, so that minutes show what hours would.
SCHEDULE = {
    "USERS_SYNC_SCHEDULE__SWEEP_SECONDS": "5",
    "USERS_SYNC_SCHEDULE__SWEEP_SHARE": "1",
    "USERS_SYNC_DELETIONS__GRACE_SECONDS": "15",
    "USERS_SYNC_WEBHOOK__SECRETS": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
}
SWEPT = "select from users_sync_worker.sweep where outcome = 'complete'"

PROMETHEUS = """
global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs:
  - job_name: users-sync
    static_configs: [{{targets: ["127.0.0.1:{port}"], labels: {{instance: worker}}}}]
"""
# In the place of Grafana's variables; and a step that a small picture can show.
CHOSEN = {"$__rate_interval": "15s", "$job": ".*"}
STEP_SECONDS = 2

Point = tuple[float, float]

COLUMNS = 3
BAND = "0.9"
# Texts stay texts, in whatever font there is.
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "",
    "font.size": 8,
    "font.sans-serif": ["DejaVu Sans"],
}
UNITS = {"s": " (s)", "cps": " (a second)", "reqps": " (a second)", "short": ""}


@dataclass(frozen=True)
class Panel:
    """One panel, and its lines: the name of each, and its points."""

    title: str
    scale: str
    lines: Sequence[tuple[str, Sequence[Point]]]


def record() -> list[Panel]:
    """Let a worker meet all of it, and read its panels."""
    with ExitStack() as opened:
        databases = opened.enter_context(opened_server())
        url = opened.enter_context(databases.fresh())
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        site = opened.enter_context(opened_site(url, folder))
        http, webhooks = free_port(), free_port()
        day = Day(site, databases, webhooks)
        site.api.on_request(day.answer)
        site.project.populate(USERS)
        ports = {"HTTP__PORT": str(http), "WEBHOOK__PORT": str(webhooks)}
        shell = site.shell.having(**SCHEDULE, **{f"USERS_SYNC_{n}": p for n, p in ports.items()})
        query = opened.enter_context(prometheus(http, folder))
        shell.start()
        until("the first sweep is done", lambda: has_swept(site))
        began = time.time()
        live(day)
        panels = json.loads((ROOT / "ops" / "grafana.json").read_text("utf-8"))["panels"]
        # Those of a fleet are folded away in a row.
        return [read(panel, query, began) for panel in panels if panel["type"] != "row"]


def has_swept(site: Site) -> bool:
    try:
        return bool(site.rows(SWEPT))
    except psycopg.Error:  # there are no tables yet
        return False


@contextmanager
def prometheus(port: int, folder: Path) -> Iterator[str]:
    """Have Prometheus read the worker's metrics; gives where to query it."""
    program = shutil.which("prometheus")
    if program is None:
        raise SystemExit("prometheus is not on the PATH")
    config, listen = folder / "prometheus.yaml", f"127.0.0.1:{free_port()}"
    config.write_text(PROMETHEUS.format(port=port), "utf-8")
    options = (f"config.file={config}", f"storage.tsdb.path={folder}/tsdb")
    arguments = [f"--{option}" for option in (*options, f"web.listen-address={listen}")]
    process = subprocess.Popen([program, *arguments], stderr=subprocess.DEVNULL)
    try:
        yield f"http://{listen}/api/v1/query_range"
    finally:
        process.terminate()
        process.wait()


def read(panel: dict[str, Any], query: str, began: float) -> Panel:
    """Ask for the series of a panel over the whole time."""
    lines = []
    for target in panel["targets"]:
        expression, times = target["expr"], (str(began), str(began + SECONDS), str(STEP_SECONDS))
        for variable, value in CHOSEN.items():
            expression = expression.replace(variable, value)
        asked = dict(zip(("query", "start", "end", "step"), (expression, *times), strict=True))
        answer = httpx.get(query, params=asked, trust_env=False).raise_for_status().json()
        for series in answer["data"]["result"]:
            points = [(at - began, float(value)) for at, value in series["values"]]
            lines.append((legend(target["legendFormat"], series["metric"]), broken(points)))
    drawn = panel["fieldConfig"]["defaults"]
    scale = drawn["custom"].get("scaleDistribution", {}).get("type", "linear")
    return Panel(panel["title"] + UNITS[drawn["unit"]], scale, lines)


def broken(points: Sequence[Point]) -> list[Point]:
    """Break a line where there was nothing to show, as Grafana does."""
    whole: list[Point] = []
    for at, value in points:
        if whole and at - whole[-1][0] > 1.5 * STEP_SECONDS:
            whole.append((at, math.nan))
        whole.append((at, value))
    return whole


def legend(pattern: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        pattern = pattern.replace("{{" + name + "}}", value)
    return pattern


def draw(path: Path, panels: Sequence[Panel], met: Sequence[Trouble]) -> None:
    """Draw all panels; the file is the same for the same points."""
    matplotlib = import_module("matplotlib")
    matplotlib.use("agg")
    matplotlib.rcParams.update(STYLE)
    pyplot = import_module("matplotlib.pyplot")
    rows = -(-len(panels) // COLUMNS)
    figure, places = pyplot.subplots(rows, COLUMNS, figsize=(13, 2.2 * rows), sharex=True)
    for place, panel in zip(places.flat, panels, strict=False):
        draw_panel(place, panel, met)
    figure.tight_layout()
    figure.savefig(path, dpi=90, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw_panel(place: Any, panel: Panel, met: Sequence[Trouble]) -> None:
    for trouble in met:
        place.axvspan(trouble.begins, trouble.ends, color=BAND, lw=0)
    for name, points in panel.lines:
        place.plot(*zip(*points, strict=True), lw=1, label=name)
    place.set_title(panel.title)
    place.set_yscale(panel.scale)
    if panel.scale == "linear":
        place.set_ylim(bottom=0)
    place.set_xlim(0, SECONDS)
    middles = [(trouble.begins + trouble.ends) / 2 for trouble in met]
    place.set_xticks(middles, [trouble.name.replace(" ", "\n") for trouble in met])
    place.legend(fontsize=6, frameon=False, loc="upper left")


if __name__ == "__main__":
    draw(Path(sys.argv[1]), record(), troubles())
