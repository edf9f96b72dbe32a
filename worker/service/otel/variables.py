"""What the standard OTEL_ variables ask for, as far as the SDK leaves it to its user."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from worker.errors import Misconfigured

Signal = Literal["traces", "metrics"]

# As the specification has them.
DEFAULT_ENDPOINT = "http://localhost:4318"
DEFAULT_INTERVAL_MILLIS = 60_000

PROTOCOL = "http/protobuf"


@dataclass(frozen=True, slots=True)
class Wanted:
    """Where a signal is sent; of the address only what may stand in a log."""

    signal: Signal
    host: str


def wanted(signal: Signal, environ: Mapping[str, str]) -> Wanted | None:
    """Say where to send a signal, or None if it is not to be sent.

    Raises Misconfigured for an exporter or a protocol that this program does not have, and for an
    endpoint that is no address.
    """
    kind = signal.upper()
    if _value(environ, "OTEL_SDK_DISABLED").lower() == "true":
        return None
    exporter = _value(environ, name := f"OTEL_{kind}_EXPORTER") or "otlp"
    if exporter not in {"otlp", "none"}:
        raise Misconfigured(f"{name} should be otlp or none: users-sync has no other exporter")
    if exporter == "none":
        return None
    name, protocol = _of_signal(environ, kind, "PROTOCOL")
    if protocol not in {"", PROTOCOL}:
        raise Misconfigured(
            f"{name} should be {PROTOCOL}, the only one that users-sync speaks; the port of a"
            " collector for it is 4318"
        )
    name, endpoint = _of_signal(environ, kind, "ENDPOINT")
    return Wanted(signal, _host(name, endpoint or DEFAULT_ENDPOINT))


def interval_seconds(environ: Mapping[str, str]) -> float:
    """Say how often to send metrics. Raises Misconfigured for what is no number."""
    text = _value(environ, "OTEL_METRIC_EXPORT_INTERVAL") or str(DEFAULT_INTERVAL_MILLIS)
    if not (text.isascii() and text.isdigit() and int(text)):
        raise Misconfigured("OTEL_METRIC_EXPORT_INTERVAL should be milliseconds, 1 or more")
    return int(text) / 1000


def _of_signal(environ: Mapping[str, str], kind: str, what: str) -> tuple[str, str]:
    """Give name and value of the variable that counts for a signal."""
    own, common = f"OTEL_EXPORTER_OTLP_{kind}_{what}", f"OTEL_EXPORTER_OTLP_{what}"
    name = own if _value(environ, own) else common
    return name, _value(environ, name)


def _host(name: str, endpoint: str) -> str:
    """Give host and port of an address, without a password that it may hold."""
    try:
        parts = urlsplit(endpoint)
        host, port = parts.hostname, parts.port
    except ValueError:  # it quotes the address
        host, port, parts = None, None, urlsplit("")
    if not host or parts.scheme not in {"http", "https"}:
        raise Misconfigured(f"{name} should be an address such as {DEFAULT_ENDPOINT}")
    return f"{host}:{port}" if port else host


def _value(environ: Mapping[str, str], name: str) -> str:
    """Give the value of a variable; as the specification has it, an empty one is not set."""
    return environ.get(name, "").strip()
