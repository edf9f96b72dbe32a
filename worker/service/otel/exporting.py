"""Sends traces and metrics while the worker runs, and never keeps it from its work."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import wait
from contextlib import ExitStack, contextmanager
from uuid import uuid4

from opentelemetry.sdk.resources import OTELResourceDetector, Resource

from worker import installed_version
from worker.errors import Misconfigured
from worker.log.setup import keep_out_of_logs
from worker.net import run_abandonable
from worker.service.otel.metrics import Families, Metrics
from worker.service.otel.sending import CollectorSession, Outage
from worker.service.otel.traces import Traces
from worker.service.otel.variables import interval_seconds, wanted
from worker.tracing import tracing

# How long the end waits for a collector that may be dead, or take a connection and say nothing.
# With the worker's own end it is to be less than five seconds.
FLUSH_SECONDS = 2.0

_HEADERS = re.compile(r"OTEL_EXPORTER_OTLP_(\w+_)?HEADERS")


@contextmanager
def exporting(environ: Mapping[str, str]) -> Iterator[Callable[[Families], None]]:
    """Send the traces of what happens inside; gives what is to be called with the metrics.

    `environ` is the process's own, which the SDK reads, too. Raises Misconfigured for an OTEL_
    variable that asks for what there is not.
    """
    keep_out_of_logs(_secrets(environ))
    seconds = interval_seconds(environ)
    traces, metrics = _exporters(environ)
    # The SDK logs every failed attempt; `Outage` logs one line for each outage instead.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL + 1)

    def send_metrics(families: Families) -> None:
        if metrics is not None:
            metrics.start(families, seconds)

    with ExitStack() as opened:
        opened.callback(_close, traces, metrics)
        if traces is not None:
            opened.enter_context(tracing(traces.follow))
        yield send_metrics


def _exporters(environ: Mapping[str, str]) -> tuple[Traces | None, Metrics | None]:
    """Make what sends each signal; None for one that is not wanted."""
    outage, resource = Outage(), _resource()
    to_traces, to_metrics = wanted("traces", environ), wanted("metrics", environ)
    try:
        return (
            Traces(CollectorSession(to_traces, outage), resource) if to_traces else None,
            Metrics(CollectorSession(to_metrics, outage), resource) if to_metrics else None,
        )
    except ValueError as error:
        raise Misconfigured(f"OpenTelemetry does not take an OTEL_ variable: {error}") from error


def _resource() -> Resource:
    """Say who sends: what the variables say, and for the rest ourselves.

    Two replicas must not be taken for one, so each process has an id.
    """
    given = OTELResourceDetector().detect().attributes
    ours = {
        "service.name": "users-sync",
        "service.version": installed_version(),
        "service.instance.id": str(uuid4()),
    }
    return Resource.create({name: text for name, text in ours.items() if name not in given})


def _close(*exporters: Traces | Metrics | None) -> None:
    """Send what is left, all at once; a collector that takes too long is left behind."""
    ending = {run_abandonable(each.close): each for each in exporters if each is not None}
    for late in wait(ending, FLUSH_SECONDS).not_done:
        ending[late].session.given_up()


def _secrets(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield the headers for the collector, whole and each by itself: they hold its keys."""
    for name, value in environ.items():
        if _HEADERS.fullmatch(name):
            yield value
            yield from (pair.partition("=")[2].strip() for pair in value.split(","))
