"""Measures how fast the worker is: `python -m tests.bench [NAME…] [--quick] [--json FILE]`."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from tests.bench import (
    api_bound,
    both_servers,
    cron,
    fleet,
    fleet_growth,
    fleet_troubles,
    freshness,
    growth,
    hints,
    initial_load,
    manners,
    server_work,
    start,
    unchanged,
)
from tests.bench.figures import Conditions, Figure, described, show, write_docs, write_json
from tests.bench.postgres import Databases, opened_server
from worker.log.setup import configure_logging

BENCHMARKS: dict[str, Callable[[Conditions, Databases], list[Figure]]] = {
    "api-bound": api_bound.run,
    "both-servers": both_servers.run,
    "initial-load": initial_load.run,
    "unchanged": unchanged.run,
    "cron": cron.run,
    "growth": growth.run,
    "freshness": freshness.run,
    "manners": manners.run,
    "hints": hints.run,
    "start": start.run,
    "server-work": server_work.run,
    "fleet": fleet.run,
    "fleet-troubles": fleet_troubles.run,
    "fleet-growth": fleet_growth.run,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="smaller, and in fewer rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="put them into this page")
    chosen = parser.parse_args()
    unknown = [name for name in chosen.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark is named {unknown[0]}; there are {', '.join(BENCHMARKS)}")
    if chosen.quick and chosen.docs:
        parser.error("what --quick measures is not for the docs")
    return chosen


def main() -> None:
    chosen, console = arguments(), Console()
    conditions = Conditions(chosen.quick)
    found: dict[str, list[Figure]] = {}
    with opened_server() as databases:
        on = described(databases.version(), quick=chosen.quick)
        for name in chosen.names or BENCHMARKS:
            began = time.perf_counter()
            found[name] = BENCHMARKS[name](conditions, databases)
            show(f"{name} ({time.perf_counter() - began:.0f} s)", found[name], console)
            # Each time: what was measured is not lost should the next one fail.
            if chosen.json:
                write_json(found, on, chosen.json)
            if chosen.docs:
                write_docs(found, on, chosen.docs)


if __name__ == "__main__":
    configure_logging("error", "console", sys.stderr)
    main()
