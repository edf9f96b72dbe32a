"""Health, readiness, metrics and the status page over HTTP, all answered from memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from worker.http_server import HttpServer, waitress_options
from worker.service.health import Health
from worker.service.metrics import Metrics
from worker.service.status_page import render

HTML = "text/html; charset=utf-8"
TEXT = "text/plain; charset=utf-8"

# The page's own style sheet is all that it needs.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)
HEADERS = (
    ("Content-Security-Policy", CONTENT_SECURITY_POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
)

# A client sends nothing but a short GET.
WAITRESS = waitress_options(threads=4, most_body_bytes=1024)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a path says."""

    status: HTTPStatus
    text: str | bytes
    content_type: str = TEXT


def web_server(host: str, port: int, health: Health, metrics: Metrics) -> HttpServer:
    """Make the server of health, metrics and the status page."""
    without = ", or to 0 to do without health, metrics and status page"
    return HttpServer(
        "http", host, port, make_app(health, metrics), options=WAITRESS, without=without
    )


def make_app(health: Health, metrics: Metrics) -> WSGIApplication:
    """Return the WSGI app."""
    return answering(
        {
            "/": lambda: Answer(HTTPStatus.OK, render(health.read()), HTML),
            "/healthz": lambda: verdict("ok", health.not_alive),
            "/readyz": lambda: verdict("ready", (*health.not_alive, *health.read().not_ready)),
            "/metrics": lambda: Answer(HTTPStatus.OK, *metrics.render()),
        }
    )


def answering(paths: Mapping[str, Callable[[], Answer]]) -> WSGIApplication:
    """Return a WSGI app that answers GET and HEAD for these paths, and nothing else."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        method, path = environ["REQUEST_METHOD"], paths.get(environ["PATH_INFO"])
        if method not in {"GET", "HEAD"}:
            answer = Answer(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD are allowed\n")
        elif path is None:
            text = "there are /, /healthz, /readyz and /metrics\n"
            answer = Answer(HTTPStatus.NOT_FOUND, text)
        else:
            answer = path()
        body = answer.text.encode() if isinstance(answer.text, str) else answer.text
        allow = [("Allow", "GET, HEAD")] if answer.status is HTTPStatus.METHOD_NOT_ALLOWED else []
        own = [("Content-Type", answer.content_type), ("Content-Length", str(len(body)))]
        start_response(f"{answer.status.value} {answer.status.phrase}", [*own, *allow, *HEADERS])
        return [] if method == "HEAD" else [body]

    return app


def verdict(good: str, reasons: tuple[str, ...]) -> Answer:
    """Answer `good`, or that it is unavailable, with a line for each reason."""
    if not reasons:
        return Answer(HTTPStatus.OK, f"{good}\n")
    return Answer(HTTPStatus.SERVICE_UNAVAILABLE, "".join(f"{reason}\n" for reason in reasons))
