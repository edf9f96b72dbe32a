"""The projects in the memory of a worker, within a budget: those used longest ago go first."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Event, Lock

import httpx

from worker.fleet.budget import Budget
from worker.fleet.projects import Project, Secrets, resolved
from worker.fleet.site import Site
from worker.service.metrics import Metrics
from worker.stack_auth.client import shared_transport
from worker.wiring import access


@dataclass(slots=True)
class Sites:
    """Safe to be called from any thread. `most_bytes` is for all mirrors together.

    `visits` is how many there may be at once, and so how many connections to an API host.
    """

    secrets: Secrets
    budget: Budget
    metrics: Metrics
    most_bytes: int
    visits: int
    ending: Event
    worker: str
    is_dead: Callable[[str], bool]
    on_wait: Callable[[float], None] = lambda _seconds: None
    _sites: OrderedDict[str, Site] = field(default_factory=OrderedDict)
    # What each took after its last visit: to ask all of them after each visit would take longer the
    # more there are.
    _sizes: dict[str, int] = field(default_factory=dict)
    _total: int = 0
    _transports: dict[str, httpx.BaseTransport] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def __len__(self) -> int:
        return len(self._sites)

    def __iter__(self) -> Iterator[Site]:
        with self._lock:
            return iter(list(self._sites.values()))

    @property
    def bytes(self) -> int:
        """About how much memory all of them take."""
        return self._total

    def known(self, name: str) -> Site | None:
        """Return a project that is in memory; it counts as used just now."""
        with self._lock:
            if name in self._sites:
                self._sites.move_to_end(name)
            return self._sites.get(name)

    def make(self, project: Project) -> Site:
        """Take a project into memory, in place of what was there. Raises Misconfigured."""
        settings = resolved(project, self.secrets)
        budget = self.budget.of(project.api_host)
        site = Site(
            project,
            settings,
            self.metrics,
            lambda purpose, stop: self.on_wait(budget.take_turn(purpose, stop)),
            self.worker,
            self.is_dead,
            ending=self.ending,
        )
        with self._lock:
            if project.api_url not in self._transports:
                self._transports[project.api_url] = shared_transport(access(settings), self.visits)
            site.transport = self._transports[project.api_url]
            self._sites[project.name] = site
            self._weigh(project.name, site.bytes)
        return site

    def drop(self, name: str) -> None:
        """Forget a project; there is nothing to close between two visits."""
        with self._lock:
            if self._sites.pop(name, None) is not None:
                self._weigh(name, 0)

    def visited(self, site: Site) -> None:
        """Take in how much memory a project takes after a visit.

        If all together take too much, projects are forgotten, those used longest ago first.
        """
        with self._lock:
            if self._sites.get(site.project.name) is not site:
                return
            self._weigh(site.project.name, site.bytes)
            if self._total <= self.most_bytes:
                return
            for name, other in list(self._sites.items())[:-1]:
                if not other.visiting.locked():
                    del self._sites[name]
                    self._weigh(name, 0)
                if self._total <= self.most_bytes:
                    break

    def _weigh(self, name: str, size: int) -> None:
        self._total += size - self._sizes.pop(name, 0)
        if size:
            self._sizes[name] = size

    def close(self) -> None:
        """Close the connections to all APIs."""
        with self._lock:
            for transport in self._transports.values():
                transport.close()
