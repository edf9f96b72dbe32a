"""One sweep with everything it needs: for `--once` and the demo."""

from collections.abc import Callable
from threading import Event

import httpx

from worker.clock import Clock
from worker.service.ownership import bind_project, give_back, save, take_lease
from worker.settings.settings import Settings
from worker.sync.cache import Cache
from worker.sync.state import SweepState
from worker.sync.sweep import Report, Sweep
from worker.wiring import deletion_policy, open_store, opened_database, opened_fetcher


def sweep_once(
    settings: Settings,
    url: str,
    stop: Event,
    on_page: Callable[[SweepState], None],
    transport: httpx.BaseTransport | None = None,
) -> Report:
    """Sweep the configured target once, with the database at `url`; `transport` is for tests.

    Raises whatever a sweep raises, LeaseLost if another worker is at work, and Misconfigured for
    a table that is not ours to write.
    """
    clock = Clock()
    with opened_database(settings, url, clock, stop) as database:
        store = open_store(settings, database)
        with opened_fetcher(settings, clock, stop, store.lease, transport=transport) as fetcher:
            take_lease(store.lease, settings.require_stack().project_id, stop)
            try:
                bind_project(store, fetcher)
                cache = Cache()
                cache.start(store)
                resume_minutes = settings.schedule.resume_minutes
                report = Sweep(
                    fetcher, store, cache, deletion_policy(settings), on_page, resume_minutes
                ).run()
                save(cache, store)
                return report
            finally:
                # With the stop set nothing is retried: the lease is given back in one attempt, or
                # it runs out.
                stop.set()
                give_back(store.lease)
