"""Serves a WSGI app by waitress in threads of its own, and ends without a trace."""

import socket
from collections.abc import Mapping
from threading import Thread
from types import TracebackType
from typing import Any, Self
from wsgiref.types import WSGIApplication

import waitress


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
