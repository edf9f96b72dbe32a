"""Every record is one line of one shape, and no secret is in it."""

import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

import pytest
import structlog

from worker.log.queue import MOST_LINES, losses
from worker.log.setup import (
    close_logging,
    configure_logging,
    flush_logging,
    keep_out_of_logs,
    reset_logging,
)

# Made before any test configures logging, as the modules of the worker do.
log = structlog.stdlib.get_logger("worker.early")

PATIENCE_SECONDS = 20

SECRET = 'ssk_hush-"quoted"\\hush'


class Written(io.StringIO):
    """What was logged so far, although another thread writes it."""

    def getvalue(self) -> str:
        flush_logging()
        return super().getvalue()


class Terminal(Written):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    yield Written()
    reset_logging()


def records(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_nothing_logged_writes_nothing(stream: io.StringIO) -> None:
    configure_logging("info", "json", stream)
    assert stream.getvalue() == ""


def test_json_is_one_event_per_line(stream: io.StringIO) -> None:
    configure_logging("info", "json", stream)
    log.info("sweep.finished", sweep=7, outcome="complete")
    log.info("two\nlines")
    first, second = records(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("timestamp"))
    assert first == {
        "event": "sweep.finished",
        "level": "info",
        "logger": "worker.early",
        "sweep": 7,
        "outcome": "complete",
    }
    assert second["event"] == "two\nlines"


def test_what_a_library_says_is_an_event_of_one_name(stream: io.StringIO) -> None:
    configure_logging("info", "json", stream)
    logging.getLogger("psycopg.pools").warning("error connecting in %r", "pool-1")
    logging.getLogger("library").warning("sweep.finished")
    log.warning("own")
    foreign, mimic, own = records(stream)
    assert foreign["message"] == "error connecting in 'pool-1'"
    assert foreign["logger"] == "psycopg.pools"
    assert (mimic["event"], mimic["message"]) == ("library.logged", "sweep.finished")
    assert set(foreign) == {*own, "message"}


def test_warnings_are_logged(stream: io.StringIO) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        configure_logging("info", "json", stream)
        warnings.warn("mind the gap", stacklevel=1)
        reset_logging()
    (record,) = records(stream)
    assert (record["logger"], record["level"]) == ("py.warnings", "warning")
    assert "mind the gap" in record["message"]


@pytest.mark.parametrize("name", ["httpx", "httpcore", "apscheduler.scheduler"])
def test_chatty_libraries_are_heard_at_debug_only(stream: io.StringIO, name: str) -> None:
    configure_logging("info", "json", stream)
    logging.getLogger(name).info("HTTP Request: GET https://api.stack-auth.com")
    logging.getLogger(name).warning("heard")
    configure_logging("debug", "json", stream)
    logging.getLogger(name).info("heard, too")
    assert [record["message"] for record in records(stream)] == ["heard", "heard, too"]


@pytest.mark.parametrize(
    ("name", "text", "logged"),
    [
        (
            "httpcore.http11",
            "receive_response_headers.complete return_value=(b'HTTP/1.1', 200, [(b'a', b'hush')])",
            "receive_response_headers.complete",
        ),
        (
            "httpcore.http11",
            "receive_response_body.failed exception=RemoteProtocolError(b'hush\n')",
            "receive_response_body.failed",
        ),
        (
            "httpx",
            'HTTP Request: GET https://api.stack-auth.com "HTTP/1.1 401 hush"',
            'HTTP Request: GET https://api.stack-auth.com "HTTP/1.1 401',
        ),
        (
            "httpcore.connection",
            "connect_tcp.failed exception=ConnectError(ConnectionRefusedError(111))",
            "connect_tcp.failed exception=ConnectError(ConnectionRefusedError(111))",
        ),
    ],
)
def test_what_an_answer_holds_is_not_logged(
    stream: io.StringIO, name: str, text: str, logged: str
) -> None:
    configure_logging("debug", "json", stream)
    logging.getLogger(name).debug("%s", text)
    assert [record["message"] for record in records(stream)] == [logged]


def test_chatty_libraries_obey_a_stricter_level(stream: io.StringIO) -> None:
    configure_logging("error", "json", stream)
    logging.getLogger("httpx").warning("unheard")
    assert records(stream) == []


def test_level_is_obeyed(stream: io.StringIO) -> None:
    configure_logging("warning", "json", stream)
    log.info("unheard")
    log.error("heard")
    assert [record["event"] for record in records(stream)] == ["heard"]


def test_configuring_again_replaces(stream: io.StringIO) -> None:
    other = Written()
    configure_logging("info", "json", other)
    configure_logging("info", "json", stream)
    configure_logging("info", "json", stream)
    log.info("once")
    assert [record["event"] for record in records(stream)] == ["once"]
    assert other.getvalue() == ""


def test_reset_leaves_nothing_behind(stream: io.StringIO) -> None:
    before = (logging.getLogger().handlers[:], logging.getLogger("httpx").level)
    configure_logging("debug", "json", stream)
    reset_logging()
    assert (logging.getLogger().handlers, logging.getLogger("httpx").level) == before
    assert not structlog.is_configured()


def test_auto_is_json_unless_on_a_terminal(stream: io.StringIO) -> None:
    terminal = Terminal()
    configure_logging("info", "auto", terminal)
    log.info("to.terminal")
    configure_logging("info", "auto", stream)
    log.info("to.file")
    assert "to.terminal" in terminal.getvalue()
    assert "{" not in terminal.getvalue()
    assert records(stream)[0]["event"] == "to.file"


def test_console_without_terminal_has_no_colours(stream: io.StringIO) -> None:
    configure_logging("info", "console", stream)
    log.info("sweep.finished", users=3)
    assert re.search(r"info +\] sweep\.finished .*users=3", stream.getvalue())
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_exceptions_show_no_locals(stream: io.StringIO, log_format: Any) -> None:
    configure_logging("info", log_format, stream)
    email = "mira" + "@example.com"  # only the local variable holds it whole
    try:
        raise LookupError("broken")  # noqa: TRY301
    except LookupError:
        log.exception("call.failed")
        logging.getLogger("apscheduler").exception("job failed")
    assert stream.getvalue().count("LookupError: broken") == 2
    assert email not in stream.getvalue()


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_secrets_are_blanked_wherever_they_stand(stream: io.StringIO, log_format: Any) -> None:
    configure_logging("info", log_format, stream)
    keep_out_of_logs([SECRET])
    log.info("event %s", SECRET)
    log.info("x", nested={"list": [SECRET], SECRET: (SECRET,)}, error=KeyError(SECRET))
    logging.getLogger("httpcore").warning("sent %r", {"key": SECRET})
    try:
        raise ValueError(SECRET)  # noqa: TRY301
    except ValueError:
        log.exception("failed")
    assert "hush" not in stream.getvalue()
    assert "event ***" in stream.getvalue()


def test_the_whole_url_is_blanked_before_its_password(stream: io.StringIO) -> None:
    configure_logging("info", "json", stream)
    keep_out_of_logs(["pass/word", "postgresql://me:pass%2Fword@db/app"])
    log.info("x", a="postgresql://me:pass%2Fword@db/app", b="pass/word", c="pass%2Fword")
    (record,) = records(stream)
    assert (record["a"], record["b"], record["c"]) == ("***", "***", "***")


def test_short_values_are_left_alone(stream: io.StringIO) -> None:
    configure_logging("info", "json", stream)
    keep_out_of_logs(["", "sweep"])
    log.info("sweep.finished")
    assert records(stream)[0]["event"] == "sweep.finished"


def test_values_that_json_cannot_hold_become_text(stream: io.StringIO) -> None:
    configure_logging("info", "json", stream)
    log.info("x", rate=float("inf"), lone="\ud800", share=0.5, on=True, none=None)
    assert "Infinity" not in stream.getvalue()
    record = records(stream)[0]
    assert (record["rate"], record["share"], record["on"], record["none"]) == (
        "inf",
        0.5,
        True,
        None,
    )


class Stalled(Written):
    """Takes nothing until it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.resumed = Event(), Event()

    def write(self, text: str) -> int:
        self.reached.set()
        self.resumed.wait(PATIENCE_SECONDS)
        return super().write(text)


def test_logging_never_waits_and_tells_of_what_it_dropped() -> None:
    stalled, before = Stalled(), losses.total
    configure_logging("info", "json", stalled)
    log.info("first")
    assert stalled.reached.wait(PATIENCE_SECONDS)
    for _ in range(MOST_LINES + 7):
        log.info("next")
    assert losses.total - before == 7
    stalled.resumed.set()
    flush_logging()
    *lines, last = records(stalled)
    assert len(lines) == MOST_LINES + 1
    assert (last["event"], last["lines"]) == ("log.dropped", 7)
    log.info("after")
    assert records(stalled)[-1]["event"] == "after"
    reset_logging()


def test_stalled_reader_does_not_keep_a_log_open() -> None:
    stalled = Stalled()
    configure_logging("info", "json", stalled)
    log.info("first")
    reset_logging()
    assert not stalled.resumed.is_set()
    stalled.resumed.set()


def test_closed_log_is_silent_about_what_threads_still_say(
    stream: io.StringIO, capfd: pytest.CaptureFixture[str]
) -> None:
    configure_logging("info", "json", stream)
    log.info("before")
    assert close_logging()
    log.info("after")
    assert [record["event"] for record in records(stream)] == ["before"]
    assert capfd.readouterr() == ("", "")


def test_what_was_logged_is_written_before_a_log_is_closed(stream: io.StringIO) -> None:
    configure_logging("info", "json", stream)
    for _ in range(500):
        log.info("next")
    reset_logging()
    assert len(records(stream)) == 500


class Secretive:
    def __str__(self) -> str:
        raise ValueError(SECRET)


@contextmanager
def no_other_handlers() -> Iterator[None]:
    """Take away pytest's own, which raise for a record that they cannot render."""
    root = logging.getLogger()
    before, root.handlers = root.handlers, []
    yield
    root.handlers = before


@pytest.mark.parametrize("arguments", [(Secretive(),), (SECRET, SECRET)])
def test_record_that_cannot_be_rendered_is_told_of_without_what_it_holds(
    stream: io.StringIO, arguments: tuple[Any, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    with no_other_handlers():
        configure_logging("info", "json", stream)
        keep_out_of_logs([SECRET])
        logging.getLogger("library").error("sent %s", *arguments)
        log.info("own", value=Secretive())
        told = [(record["event"], record["source"]) for record in records(stream)]
    assert told == [("log.failed", "library"), ("log.failed", "worker.early")]
    assert "hush" not in stream.getvalue() + "".join(capfd.readouterr())


def test_stream_that_was_closed_costs_its_lines_and_no_more(
    stream: io.StringIO, capfd: pytest.CaptureFixture[str]
) -> None:
    before = losses.total
    configure_logging("info", "json", stream)
    stream.close()
    log.info("unheard")
    flush_logging()
    assert losses.total - before == 1
    assert capfd.readouterr() == ("", "")
