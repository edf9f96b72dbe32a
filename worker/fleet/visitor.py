"""One visit from its job to the next one: begin, do, note what was found, defer."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event, Lock

import structlog

from worker.errors import Misconfigured, UsersSyncError
from worker.fleet.control import SHARED_QUEUE, Begun, Control, Tick
from worker.fleet.site import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, Outcome, Site
from worker.fleet.sites import Sites
from worker.log.setup import own_secrets

log = structlog.stdlib.get_logger(__name__)

# A worker that has more than its share lets go of what is beyond it; a little more is no reason.
SHARE_SLACK = 1.1


@dataclass(slots=True)
class Visitor:
    """The visits of one worker. `most` are the visits at once to an API host and to a database.

    `on_visit` is told how each one ended, and how many seconds it took.
    """

    name: str
    control: Control
    sites: Sites
    most: tuple[int, int]
    visit_seconds: float
    ending: Event
    on_visit: Callable[[str, Outcome, float], None] = lambda _name, _outcome, _seconds: None
    monotonic: Callable[[], float] = time.monotonic
    tick: Tick = field(default_factory=lambda: Tick(1, 0, looks=False))
    _deadlines: dict[str, tuple[float, Site]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    @property
    def queue(self) -> str:
        """Name the queue of the visits that come back to this worker, which has the mirrors."""
        return f"{SHARED_QUEUE}:{self.name}"

    def run(self, name: str) -> None:
        """Make one visit. Raises only for the control database: then the roster defers the next."""
        with structlog.contextvars.bound_contextvars(project=name):
            begun = self.control.begin_visit(name, self.name, self.queue, self.most)
            if begun.state != "begun":
                self._not_begun(name, begun)
                return
            site = None
            try:
                site = self._site(name, begun)
            except Misconfigured as error:
                self._refused(name, error, begun)
            except UsersSyncError as error:
                log.warning("visit.failed", error=str(error))
                raise
            if site is not None:
                self._visit(site, begun)

    def mind_the_time(self) -> None:
        """Stop visits that have had their time, and all of them when the worker ends."""
        now = self.monotonic()
        with self._lock:
            for deadline, site in self._deadlines.values():
                if self.ending.is_set() or (now >= deadline and site.may_be_cut):
                    site.stop.set()

    def _site(self, name: str, begun: Begun) -> Site | None:
        """Find the project in memory, or take it there. None if it is gone."""
        site = self.sites.known(name)
        if site is not None and site.project.revision == begun.revision and not site.broken:
            return site
        project = self.control.project(name)
        return None if project is None else self.sites.make(project)

    def _visit(self, site: Site, begun: Begun) -> None:
        name = site.project.name
        with site.visiting, own_secrets(site.settings.secrets()):
            began = self.monotonic()
            with self._lock:
                self._deadlines[name] = began + self.visit_seconds, site
            if self.ending.is_set():
                site.stop.set()
            try:
                outcome = site.visit(hinted=begun.hinted, failures=begun.failures)
            finally:
                # Out of the list first: mind_the_time, in another thread, must not set the stop of
                # the next visit.
                with self._lock:
                    del self._deadlines[name]
                site.stop.clear()
        self.on_visit(name, outcome, self.monotonic() - began)
        queue = self._next_queue(name)
        self.control.end_visit(name, self.name, queue, outcome.pause, site.found(outcome))
        self.sites.visited(site)

    def _next_queue(self, name: str) -> str:
        """Say who makes the next visit: this worker, unless it ends or has more than its share."""
        if self.ending.is_set():
            return SHARED_QUEUE
        share = math.ceil(self.tick.projects / max(1, self.tick.workers) * SHARE_SLACK)
        if self.tick.workers > 1 and len(self.sites) > share + 1:
            self.sites.drop(name)
            return SHARED_QUEUE
        return self.queue

    def _not_begun(self, name: str, begun: Begun) -> None:
        log.debug("visit.postponed", state=begun.state)
        if begun.state == "gone":
            self.sites.drop(name)

    def _refused(self, name: str, error: Misconfigured, begun: Begun) -> None:
        """Note that a project cannot be visited as its row is: a person must act."""
        self.sites.drop(name)
        tell = log.debug if begun.failures else log.warning
        tell("visit.failed", error=str(error))
        pause = min(FIRST_PAUSE_SECONDS * 2 ** min(begun.failures, 8), LONGEST_PAUSE_SECONDS)
        outcome = Outcome("failed", pause, str(error), fatal=True)
        self.on_visit(name, outcome, 0.0)
        found = {"outcome": "failed", "error": str(error), "fatal": True, "requests": 0}
        self.control.end_visit(name, self.name, SHARED_QUEUE, pause, found)
