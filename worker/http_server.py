"""Serves a WSGI app by waitress in threads of its own, and ends without a trace."""

import errno
import select
import socket
from collections.abc import Mapping
from threading import Thread
from types import TracebackType
from typing import Any, Self
from wsgiref.types import WSGIApplication

import waitress

from worker.errors import Misconfigured


def waitress_options(*, threads: int, most_body_bytes: int) -> Mapping[str, Any]:
    """Give the limits of a server that anybody may reach.

    Slow clients keep their connections and no thread; but past the limit no connection is accepted,
    and no health check either. It is well below the usual 1,024 descriptors, for the database needs
    one, too.
    """
    return {
        "threads": threads,
        "connection_limit": 500,
        "asyncore_use_poll": hasattr(select, "poll"),  # select() knows no descriptor above 1,024
        "ident": None,
        "max_request_header_size": 16_384,
        "max_request_body_size": most_body_bytes,
        "channel_timeout": 15,
        "cleanup_interval": 5,
    }


class WsgiServer:
    """Serves on a socket that listens, from when it is entered until it is left."""

    def __init__(
        self, app: WSGIApplication, listening: socket.socket, name: str, options: Mapping[str, Any]
    ) -> None:
        self.polling = waitress.create_server(app, map={}, sockets=[listening], **options)
        self.thread = Thread(target=self.polling.run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        left: dict[int, Any] = {}

        def leave_all() -> None:
            polled: dict[int, Any] = self.polling._map  # noqa: SLF001  it has no public name
            left.update(polled)
            polled.clear()

        # Polling ends with nothing left to poll. Things are closed only then: pulling the trigger
        # writes to a descriptor of its own, and the threads that answer pull it, too.
        self.polling.trigger.pull_trigger(leave_all)
        self.thread.join()
        for channel in list(self.polling.active_channels.values()):
            channel.handle_close()  # a thread may wait for its client
        self.polling.task_dispatcher.shutdown()
        self.polling.asyncore.close_all(left, ignore_all=True)


class HttpServer:
    """Serves an app at an address, from when it is entered until it is left.

    `section` names the settings `host` and `port` in errors, `without` says there how to do without
    the server. Port 0 takes any free one; `port` tells which. Raises Misconfigured if the address
    cannot be had.
    """

    def __init__(  # noqa: PLR0913  each is the caller's
        self,
        section: str,
        host: str,
        port: int,
        app: WSGIApplication,
        *,
        options: Mapping[str, Any],
        without: str = "",
    ) -> None:
        self.host = host
        self.port = port
        self._section = section
        self._app = app
        self._options = options
        self._without = without

    def __enter__(self) -> Self:
        try:
            listening = _listen(self.host, self.port)
        except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host can be like that
            raise self._cannot_listen(error) from error
        self.port = listening.getsockname()[1]
        self._server = WsgiServer(self._app, listening, self._section, self._options)
        self._server.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.__exit__(kind, error, traceback)

    def _cannot_listen(self, error: Exception) -> Misconfigured:
        section, variable = self._section, f"USERS_SYNC_{self._section.upper()}__"
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        if taken or isinstance(error, PermissionError):
            why = "is taken" if taken else "needs a privileged user"
            return Misconfigured(
                f"{section}.port: port {self.port} of {self.host} {why}: set {section}.port"
                f" ({variable}PORT) to another one{self._without}"
            )
        return Misconfigured(
            f"{section}.host: cannot listen on {self.host}: set {section}.host ({variable}HOST) to"
            " an address of this machine, such as 127.0.0.1 or 0.0.0.0"
        )


def _listen(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, address = found[0][0], found[0][4]
    # Listening on every IPv6 address includes every IPv4 address.
    both = host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server(address, family=family, dualstack_ipv6=both)
