"""A worker of the fleet: visits, roster, endpoints, until it is stopped."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from threading import Event
from typing import Any
from uuid import uuid4

import psycopg
import structlog
from procrastinate import App
from procrastinate.exceptions import ConnectorException

from worker.errors import UsersSyncError
from worker.fleet.budget import Budget
from worker.fleet.control import SHARED_QUEUE, SILENCE_SECONDS, Alive, Control
from worker.fleet.engine import (
    cancelled,
    fail_jobs_of_the_dead,
    make_app,
    serve,
)
from worker.fleet.page import SHOWN_PROJECTS, render
from worker.fleet.projects import Secrets
from worker.fleet.sites import Sites
from worker.fleet.telemetry import FleetTelemetry
from worker.fleet.visitor import Visitor
from worker.fleet.webhooks import Webhooks
from worker.http_server import HttpServer
from worker.service.endpoints import HTML, WAITRESS, Answer, answering, verdict
from worker.service.metrics import Metrics
from worker.service.webhooks import WAITRESS as WEBHOOK_WAITRESS
from worker.settings.settings import Settings

log = structlog.stdlib.get_logger(__name__)

# How often visits are looked at that have had their time, and the stop.
BEAT_SECONDS = 0.25
# How often a worker tells that it is alive, and learns whether all others are.
TICK_SECONDS = 1.0
# At each of so many ticks it also looks how the whole fleet is, which takes longer.
TICKS_TO_OVERVIEW = 8
# How often one of them looks after the roster, beside whenever a worker fell silent; a little less
# than ten, for ticks are no clockwork.
ROSTER_SECONDS = 9.5
# A visit that is so late is for any worker that has time.
LATE_SECONDS = 5.0
RECONNECT_SECONDS = 1.0

# What it looks like when the control database is away, or takes no more connections.
LOST = (ConnectorException, psycopg.Error, OSError)

MEGABYTE = 1_000_000


@dataclass(slots=True)
class FleetWorker:
    """One worker of the fleet, until `stop` is set."""

    settings: Settings
    stop: Event
    name: str = field(
        default_factory=lambda: f"{socket.gethostname()[:40]}:{os.getpid()}:{uuid4().hex[:8]}"
    )
    tick_seconds: float = TICK_SECONDS
    roster_seconds: float = ROSTER_SECONDS
    webhook_port: int | None = None
    telemetry: FleetTelemetry = field(init=False)
    metrics: Metrics = field(init=False)
    sites: Sites = field(init=False)
    _control: Control = field(init=False)
    _visitor: Visitor = field(init=False)
    _lost: bool = False
    _ticks: int = 0

    def __post_init__(self) -> None:
        fleet = self.settings.fleet
        # Not our stop: visits under way must still be noted as ended, and what waits for us handed
        # on, after a signal.
        self._control = Control(self.settings.require_fleet(), Event())
        self.telemetry = FleetTelemetry(self.name, fleet.metrics_projects)
        self.metrics = Metrics(None, self.telemetry)
        budget = Budget(self._control, fleet.requests_per_second, self._share)
        self.sites = Sites(
            Secrets(fleet.secrets_dir),
            budget,
            self.metrics,
            fleet.memory_mb * MEGABYTE,
            fleet.visits,
            self.stop,
            self.name,
            self._control.is_dead,
            self.telemetry.waited,
        )
        self._visitor = Visitor(
            self.name,
            self._control,
            self.sites,
            (fleet.host_visits, fleet.database_visits),
            fleet.visit_seconds,
            self.stop,
            self.telemetry.visited,
        )

    def run(self) -> None:
        """Work until stopped. Raises Misconfigured or DatabaseUnavailable if it cannot begin."""
        self._control.require_init()
        with ExitStack() as opened:
            opened.callback(self._control.close)
            opened.callback(self.sites.close)
            if self.settings.http.port:
                opened.enter_context(self._endpoints())
            if self.settings.fleet.webhooks:
                self.webhook_port = opened.enter_context(self._webhooks()).port
            pool = ThreadPoolExecutor(self.settings.fleet.visits, thread_name_prefix="visit")
            opened.callback(partial(pool.shutdown, wait=False, cancel_futures=True))
            log.info("fleet.joined", worker=self.name)
            asyncio.run(self._main(pool))
            if not self._lost:
                with suppress(UsersSyncError):
                    self._control.leave(self.name)
        log.info("fleet.left", worker=self.name, visits=self.telemetry.ended)

    async def _main(self, pool: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_tell_in_a_line)

        async def visit(project: str) -> None:
            with suppress(UsersSyncError):  # of the control database: the roster defers the next
                await loop.run_in_executor(pool, self._visitor.run, project)

        serving = asyncio.create_task(self._serve(visit))
        stopping = False
        while not serving.done():
            self.telemetry.beat()
            self._visitor.mind_the_time()
            if self.stop.is_set() and not stopping:
                stopping = True
                serving.cancel()
            await asyncio.wait([serving], timeout=BEAT_SECONDS)
        with suppress(asyncio.CancelledError, *LOST):
            await serving

    async def _serve(self, visit: Callable[[str], Awaitable[None]]) -> None:
        """Make visits until cancelled; begin again whenever the control database was lost."""
        queues = [SHARED_QUEUE, self._visitor.queue]
        # A cancelled engine that meets an error in its last statements raises that instead.
        while not self.stop.is_set():
            try:
                app = make_app(self.settings.require_fleet(), visit)
                async with app.open_async():
                    ticking = asyncio.create_task(self._tick(app))
                    try:
                        await serve(app, queues, self.settings.fleet.visits)
                    finally:
                        await cancelled(ticking)
            except LOST as error:
                self._note_lost(error)
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _tick(self, app: App) -> None:
        """Tell that this worker is alive, and look after the roster when it is its turn."""
        while True:
            try:
                await asyncio.to_thread(self._tell)
                if self._visitor.tick.looks:
                    await fail_jobs_of_the_dead(app)
                    await asyncio.to_thread(self._look_after)
                self._note_found()
            except (UsersSyncError, *LOST) as error:
                self._note_lost(error)
            await asyncio.sleep(self.tick_seconds)

    def _tell(self) -> None:
        telemetry, sites = self.telemetry, self.sites
        telemetry.in_memory, telemetry.mirror_bytes = len(sites), sites.bytes
        alive = Alive(self.name, socket.gethostname(), telemetry.in_memory, telemetry.mirror_bytes)
        self._visitor.tick = self._control.tick(alive, self.roster_seconds, SILENCE_SECONDS)
        if self._ticks % TICKS_TO_OVERVIEW == 0:
            named = telemetry.metrics_projects
            telemetry.see(self._control.overview(SHOWN_PROJECTS, named))
        self._ticks += 1
        telemetry.workers = self._visitor.tick.workers
        telemetry.control_answered()

    def _look_after(self) -> None:
        rate = self.settings.fleet.requests_per_second
        deferred = self._control.look_after(SILENCE_SECONDS, LATE_SECONDS, rate)
        if deferred:
            log.info("visits.deferred", visits=deferred)

    def _share(self) -> float:
        return 1 / max(1, self._visitor.tick.workers)

    def _note_lost(self, error: Exception) -> None:
        if not self._lost:
            self._lost = True
            log.warning("control.lost", error=(str(error) or type(error).__name__).splitlines()[0])

    def _note_found(self) -> None:
        if self._lost:
            self._lost = False
            log.info("control.found")

    def _endpoints(self) -> HttpServer:
        http, seen = self.settings.http, self.telemetry
        app = answering(
            {
                "/": lambda: Answer(HTTPStatus.OK, render(seen), HTML),
                "/healthz": lambda: verdict("ok", seen.not_alive),
                "/readyz": lambda: verdict("ready", seen.not_ready),
                "/metrics": lambda: Answer(HTTPStatus.OK, *self.metrics.render()),
            }
        )
        without = ", or to 0 to do without health, metrics and status page"
        return HttpServer("http", http.host, http.port, app, options=WAITRESS, without=without)

    def _webhooks(self) -> HttpServer:
        webhook = self.settings.webhook
        secrets = Secrets(self.settings.fleet.secrets_dir)
        app = Webhooks(self._control, secrets, self.stop).app(self.metrics.count_webhook)
        return HttpServer("webhook", webhook.host, webhook.port, app, options=WEBHOOK_WAITRESS)


def _tell_in_a_line(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Tell of what the engine did not catch: at an outage that is each of its jobs."""
    log.debug("engine.failed", error=type(context.get("exception")).__name__)
