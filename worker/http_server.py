"""Serves a WSGI app by waitress in threads of its own, and ends without a trace."""

import errno
import socket
from collections.abc import Mapping
from threading import Thread
from types import TracebackType
from typing import Any, Self
from wsgiref.types import WSGIApplication

import waitress

from worker.errors import Misconfigured

# How to do without what a section configures.
WITHOUT = {"http": ", or to 0 to do without health, metrics and status page"}


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
        # Polling ends with nothing left to poll. Things are closed only then: pulling the trigger
        # writes to a descriptor of its own, and the threads that answer pull it, too.
        self.polling.trigger.pull_trigger(self._leave_all)
        self.thread.join()
        for channel in list(self.polling.active_channels.values()):
            channel.handle_close()  # a thread may wait for its client
        self.polling.task_dispatcher.shutdown()
        self.polling.asyncore.close_all(self._left, ignore_all=True)

    def _leave_all(self) -> None:
        polled: dict[int, Any] = self.polling._map  # noqa: SLF001  it has no public name
        self._left = dict(polled)
        polled.clear()


def listen(host: str, port: int, section: str) -> socket.socket:
    """Listen on an address; errors name the settings `host` and `port` of this section."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, address = found[0][0], found[0][4]
        # Listening on every IPv6 address includes every IPv4 address.
        both = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=family, dualstack_ipv6=both)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host can be like that
        raise _cannot_listen(host, port, section, error) from error


def _cannot_listen(host: str, port: int, section: str, error: Exception) -> Misconfigured:
    variable = f"USERS_SYNC_{section.upper()}__"
    taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
    if taken or isinstance(error, PermissionError):
        why = "is taken" if taken else "needs a privileged user"
        return Misconfigured(
            f"{section}.port: port {port} of {host} {why}: set {section}.port ({variable}PORT) to"
            f" another one{WITHOUT.get(section, '')}"
        )
    return Misconfigured(
        f"{section}.host: cannot listen on {host}: set {section}.host ({variable}HOST) to an"
        " address of this machine, such as 127.0.0.1 or 0.0.0.0"
    )
