"""Traces of sweeps: each with its pages, and these with the transactions that wrote them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, StatusCode

from worker import installed_version
from worker.errors import Stopped
from worker.service.otel.sending import CollectorSession
from worker.tracing import Note

KINDS = {"transaction": SpanKind.CLIENT}


class Traces:
    """Follows the work, and sends what it saw from a thread of its own."""

    def __init__(self, session: CollectorSession, resource: Resource) -> None:
        self.session = session
        # The SDK's own shutdown on exit would wait for a dead collector for as long as it takes.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_Spans(session)))
        self._tracer = self._provider.get_tracer("users-sync", installed_version())

    @contextmanager
    def follow(self, name: str) -> Iterator[Note]:
        """Follow one stretch of work; what is no part of a sweep, such as a poll, is not traced.

        Of an error only type and SQLSTATE are kept: its words might quote a row.
        """
        if name != "sweep" and not trace.get_current_span().get_span_context().is_valid:
            yield lambda **_what: None
            return
        with self._tracer.start_as_current_span(
            name,
            kind=KINDS.get(name, SpanKind.INTERNAL),
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield lambda **what: span.set_attributes(
                    {f"users_sync.{key}": value for key, value in what.items()}
                )
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                if state := getattr(error, "sqlstate", None):
                    span.set_attribute("db.response.status_code", state)
                if not isinstance(error, Stopped):  # that was asked for
                    span.set_status(StatusCode.ERROR)
                raise

    def close(self) -> None:
        """Send what is left, and wait for that."""
        self._provider.shutdown()


class _Spans(SpanExporter):
    """Exports spans, and tells the session whether the collector took them."""

    def __init__(self, session: CollectorSession) -> None:
        self._session = session
        self._exporter: SpanExporter = OTLPSpanExporter(session=session)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        success, failure = SpanExportResult.SUCCESS, SpanExportResult.FAILURE
        taken = self._session.sent(lambda: self._exporter.export(spans) is success)
        return success if taken else failure

    def shutdown(self) -> None:
        self._exporter.shutdown()
