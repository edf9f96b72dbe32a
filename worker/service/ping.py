"""The dead man's ping: a monitor that is called after each complete sweep notices when none is."""

from threading import Event
from urllib.request import getproxies

import httpx
import structlog

from worker import installed_version
from worker.errors import UsersSyncError
from worker.log.setup import keep_out_of_logs
from worker.stack_auth.transport import Network, choose_proxy, request_deadline

log = structlog.stdlib.get_logger(__name__)

# All in all, looking up the name included: the sweep is done, and cron waits.
LONGEST_SECONDS = 5.0


def ping(address: str, stop: Event) -> None:
    """Call this address by GET, once; whatever goes wrong is a warning in the log, no error.

    Of the address nothing but the host is told. `stop` ends the attempt.
    """
    url = httpx.URL(address)
    keep_out_of_logs([str(url)])  # as httpx writes it
    try:
        status = _get(url, stop)
    except Exception as error:  # noqa: BLE001  the sweep is complete, whatever becomes of its ping
        log.warning("ping.failed", host=url.host, error=_told(error))
        return
    if not httpx.codes.is_success(status):
        log.warning("ping.failed", host=url.host, error=f"answered with status {status}")
        return
    log.info("ping.sent", host=url.host)


def _get(url: httpx.URL, stop: Event) -> int:
    network = Network(url, choose_proxy(url, getproxies()))
    headers = {"user-agent": f"users-sync/{installed_version()}"}
    with (
        httpx.Client(transport=network, headers=headers, trust_env=False) as client,
        request_deadline(LONGEST_SECONDS, stop),
        client.stream("GET", url) as answer,
    ):
        return answer.status_code


def _told(error: Exception) -> str:
    """Say what went wrong in words that quote nothing of the address."""
    match error:
        case UsersSyncError():
            return str(error)
        case httpx.TimeoutException():
            return f"no answer within {LONGEST_SECONDS:g} s"
        case httpx.ConnectError():
            return f"could not be reached: {error}"
        case _:
            return f"could not be called: {type(error).__name__}"
