"""Measures what a run from cron takes before it asks for anything."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import median
from threading import Event, Thread

from tests.bench.api import started_api
from tests.bench.figures import Conditions, Figure
from tests.bench.postgres import Databases
from tests.bench.workers import once, running

MOST_SECONDS = 60.0


def run(conditions: Conditions, databases: Databases) -> list[Figure]:
    users = conditions.choose(1_000, 60_000)
    took: list[float] = []
    with started_api(users) as api, databases.fresh() as url:
        once(api, url)
        for _ in range(conditions.rounds + 1):
            with asked() as (address, request, answer):
                waiting = replace(api, url=address)
                with running(waiting, url, once=True) as worker:
                    if not request.wait(MOST_SECONDS):
                        raise RuntimeError(f"it asked for nothing: {worker.log.read_text('utf-8')}")
                    took.append(worker.processor_seconds())
                    answer.set()
    return [
        Figure(
            "command to first request, warm", median(took[1:]), "s of processor time", at_most=0.35
        ),
        Figure("users in the project", users),
    ]


@contextmanager
def asked() -> Iterator[tuple[str, Event, Event]]:
    """Serve an API that says when it is asked, and answers nothing useful once it may."""
    request, answer = Event(), Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            request.set()
            answer.wait(MOST_SECONDS)
            self.send_error(401)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", request, answer
    finally:
        answer.set()
        server.shutdown()
        server.server_close()
