"""The engine that hands out visits: procrastinate, in the control database.

Its retries are off, and its jobs end well whatever a visit met: what comes next is `end_visit`'s to
defer, and the roster's where a worker died.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog
from procrastinate import App, PsycopgConnector
from procrastinate.exceptions import ConnectorException
from procrastinate.jobs import Status

from worker.fleet.control import SILENCE_SECONDS
from worker.store.database import KEEPALIVES

log = structlog.stdlib.get_logger(__name__)

TASK = "visit"

# Nothing tells of a job that falls due, so this is how late a visit can be; a notification for each
# deferred job would wake every worker for nothing, and does not pass a pooler.
POLL_SECONDS = 0.5
HEARTBEAT_SECONDS = 1.0
# A process ends within five seconds of a signal.
GRACEFUL_SECONDS = 2.5
CANCEL_SECONDS = 0.5
# Nor does it wait long for a connection that is not there.
CONNECTION_SECONDS = 2.0
# The engine's own statements come one after the other; a second connection is for its heartbeat.
CONNECTIONS = 2


def make_app(url: str, visit: Callable[[str], Awaitable[None]]) -> App:
    """Make the engine for the control database at `url`; each job calls `visit` with a project."""
    # They tell of every attempt to connect, and of every statement that fails, with a trace; that
    # the database is away is told once.
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)
    for each in ("procrastinate.worker", "procrastinate.utils"):
        logging.getLogger(each).setLevel(logging.CRITICAL)
    # No session state: transaction pooling takes it.
    kwargs = {
        "autocommit": True,
        "prepare_threshold": None,
        "application_name": "users-sync-fleet",
        **KEEPALIVES,
    }
    connector = PsycopgConnector(
        conninfo=url, kwargs=kwargs, min_size=1, max_size=CONNECTIONS, timeout=CONNECTION_SECONDS
    )
    app = App(connector=connector)

    @app.task(name=TASK)
    async def run(project: str) -> None:
        await visit(project)

    return app


async def serve(app: App, queues: list[str], visits: int) -> None:
    """Make so many visits at once, until cancelled; those under way are awaited, but not for long.

    Raises ConnectorException when the control database is lost.
    """
    await app.run_worker_async(
        queues=queues,
        concurrency=visits,
        fetch_job_polling_interval=POLL_SECONDS,
        # A visit is never aborted on request.
        abort_job_polling_interval=3600.0,
        shutdown_graceful_timeout=GRACEFUL_SECONDS,
        listen_notify=False,
        delete_jobs="always",
        install_signal_handlers=False,
        update_heartbeat_interval=HEARTBEAT_SECONDS,
        stalled_worker_timeout=SILENCE_SECONDS,
    )


async def fail_jobs_of_the_dead(app: App) -> int:
    """Fail the jobs of workers that fell silent, for good; returns how many.

    To try them again is not for the engine: where the next visit waits already, its lock for that
    would be in the way.
    """
    jobs = app.job_manager
    stalled = list(
        await jobs.get_stalled_jobs(task_name=TASK, seconds_since_heartbeat=SILENCE_SECONDS)
    )
    for job in stalled:
        with suppress(ConnectorException):  # it came to its end just now
            await jobs.finish_job(job, Status.FAILED, delete_job=True)
    await jobs.prune_stalled_workers(SILENCE_SECONDS)
    if stalled:
        log.warning("visits.lost", visits=len(stalled))
    return len(stalled)


async def cancelled(task: "asyncio.Task[None]") -> None:
    """Cancel a task, again and again: a lost connection may swallow it; and wait for its end."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=CANCEL_SECONDS)
