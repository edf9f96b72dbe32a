"""How log records look, and what never stands in one."""

import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import wait
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from queue import Queue
from typing import Any, Literal, TextIO
from urllib.parse import quote

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from worker.log.queue import LineHandler, LineWriter
from worker.net import run_abandonable

Format = Literal["auto", "json", "console"]

HANDLER_NAME = "users-sync"
LIBRARY_EVENT = "library.logged"
# They tell of every request, URL included, and of every job, once a second.
CHATTY = ("httpx", "httpcore", "apscheduler", "procrastinate")
# What httpcore and httpx tell of an answer goes on with its headers, or with bytes out of its body.
_ANSWER = re.compile(r'(^receive_response_\w+\.\w+|"HTTP/[\d.]+ \d+)\b.*', re.DOTALL)
# Shorter values would turn ordinary words into asterisks.
SHORTEST_SECRET = 6
# How long a reader that stalls can delay the end of a log.
FLUSH_SECONDS = 1.0

_secrets: set[str] = set()
# Those of the project that this thread works for: all the others' would make each line slow.
_own_secrets: ContextVar[frozenset[str]] = ContextVar("own_secrets", default=frozenset())
_writers: list[LineWriter] = []


def configure_logging(level: str, log_format: Format, stream: TextIO) -> None:
    """Log to `stream` from now on, records of libraries and warnings included.

    A thread of its own writes the lines, so that logging never waits for their reader.
    Called again, it replaces what it did before. Loggers that were made earlier follow.
    """
    reset_logging(forget_secrets=False)
    as_json = log_format == "json" or (log_format == "auto" and not stream.isatty())
    lines: Queue[logging.LogRecord] = Queue()
    handler = LineHandler(lines)
    handler.set_name(HANDLER_NAME)
    renderer = structlog.processors.JSONRenderer() if as_json else _console_renderer(stream)
    handler.setFormatter(_formatter(renderer))
    threshold = logging.getLevelNamesMapping()[level.upper()]
    _writers.append(LineWriter(lines, stream))
    _writers[-1].start()
    logging.getLogger().addHandler(handler)
    quieter = max(threshold, logging.WARNING)
    _set_levels(threshold, threshold if threshold <= logging.DEBUG else quieter)
    logging.captureWarnings(capture=True)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_common_processors(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def reset_logging(*, forget_secrets: bool = True) -> None:
    """Undo `configure_logging`, and `keep_out_of_logs` as well unless told otherwise."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if handler.name == HANDLER_NAME]:
        root.removeHandler(handler)
    close_logging()
    _set_levels(logging.WARNING, logging.NOTSET)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()
    if forget_secrets:
        _secrets.clear()


def close_logging() -> bool:
    """Write what was logged, and nothing that is logged from now on.

    Returns False if that took too long, and lines are lost.
    """
    ending = [run_abandonable(writer.stop) for writer in _writers]
    _writers.clear()
    return not wait(ending, FLUSH_SECONDS).not_done


def flush_logging() -> None:
    """Wait until what was logged is written, but not for long."""
    wait([run_abandonable(writer.flush) for writer in _writers], FLUSH_SECONDS)


def keep_out_of_logs(secrets: Iterable[str]) -> None:
    """Replace these values by `***` wherever they would stand in a record, escaped or not."""
    _secrets.update(_in_all_forms(secrets))


@contextmanager
def own_secrets(secrets: Iterable[str]) -> Iterator[None]:
    """Keep these values, too, out of what is logged inside the block, in its context."""
    token = _own_secrets.set(_own_secrets.get() | _in_all_forms(secrets))
    try:
        yield
    finally:
        _own_secrets.reset(token)


def _in_all_forms(secrets: Iterable[str]) -> frozenset[str]:
    return frozenset(
        form
        for secret in secrets
        if len(secret) >= SHORTEST_SECRET
        for form in (secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret, safe=""))
    )


def _set_levels(threshold: int, chatty_threshold: int) -> None:
    logging.getLogger().setLevel(threshold)
    for name in CHATTY:
        logging.getLogger(name).setLevel(chatty_threshold)


def _formatter(renderer: Processor) -> logging.Formatter:
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*_common_processors(), _leave_out_answers, _name_event],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            # Plain tracebacks: pretty ones show local variables, which hold keys and emails.
            structlog.processors.format_exc_info,
            _redact,
            renderer,
        ],
    )


def _common_processors() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.StackInfoRenderer(),
        _add_timestamp,
    ]


def _leave_out_answers(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    if str(event.get("logger")).startswith(("httpx", "httpcore")):
        event["event"] = _ANSWER.sub(r"\1", str(event["event"]))
    return event


def _name_event(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Log what a library says as an event of one name: its own words are none of our events."""
    return {**event, "event": LIBRARY_EVENT, "message": event["event"]}


def _console_renderer(stream: TextIO) -> Processor:
    return structlog.dev.ConsoleRenderer(
        # Windows needs another package for colours, and structlog refuses to go on without.
        colors=stream.isatty() and sys.platform != "win32",
        sort_keys=False,
        exception_formatter=structlog.dev.plain_traceback,
    )


def _add_timestamp(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    event["timestamp"] = now.replace("+00:00", "Z")
    return event


def _redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Blank out secrets, last before rendering, when exceptions are text already."""
    event = {"event": event.pop("event", ""), **event}  # first on the line
    # Longest first: a password is a part of its URL.
    secrets = sorted(_secrets | _own_secrets.get(), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, secrets))) if secrets else None
    return {key: _clean(value, pattern) for key, value in event.items()}


def _clean(value: Any, pattern: re.Pattern[str] | None) -> Any:
    """Return the value as JSON can hold it, without secrets."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, Mapping):
        return {_clean(str(key), pattern): _clean(item, pattern) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean(item, pattern) for item in value]
    if isinstance(value, float) and math.isfinite(value):
        return value
    return pattern.sub("***", str(value)) if pattern else str(value)
