"""The health check of the image: exits with 0 while the worker of this container is alive.

It is run by its path and imports nothing of the worker, for a container runs it twice a minute:

    python -I -S healthcheck.py
"""

import os
import socket
import sys
from collections.abc import Mapping

# Docker's and Kubernetes' own patience with a health check is of that order.
PATIENCE_SECONDS = 3
MOST_BYTES = 10_000
# What one cannot connect to, and what stands for this machine instead.
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  asked for, not bound


def main() -> int:
    try:
        host, port = address(os.environ)
        # With the endpoints turned off there is nothing to ask.
        found = trouble(host, port) if port else None
    except (OSError, ValueError) as error:
        found = f"the settings of [http] cannot be read: {error}"
    if found:
        print(f"not alive: {found}", file=sys.stderr)
    return 1 if found else 0


def address(
    environ: Mapping[str, str], secrets_dir: str = "/run/secrets", working_dir: str = "."
) -> tuple[str, int]:
    """Say where the worker listens, by its environment, secret files and configuration file.

    The order is that of `load_settings`. Raises OSError or ValueError for what cannot be read.
    """
    given: dict[str, object] = {"host": "127.0.0.1", "port": 8080}
    given |= _of_config_file(environ, working_dir)
    for name in given:
        variable = f"USERS_SYNC_HTTP__{name.upper()}"
        given[name] = (
            environ.get(variable, "").strip()
            or _text(f"{secrets_dir}/{variable}").strip()
            or given[name]
        )
    return str(given["host"]), int(str(given["port"]))


def trouble(host: str, port: int) -> str | None:
    """Say why the worker that listens there is not alive; None if it is."""
    try:
        reached = socket.create_connection((WILDCARDS.get(host, host), port), PATIENCE_SECONDS)
        with reached, reached.makefile("rb") as answer:
            reached.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            status, _, rest = answer.read(MOST_BYTES).partition(b"\r\n")
    except (OSError, ValueError) as error:  # a host name that is none is a ValueError
        return f"{host} port {port}: {error}"
    if status.split()[1:2] == [b"200"]:
        return None
    reason = rest.partition(b"\r\n\r\n")[2] or status
    return f"/healthz says: {reason.decode(errors='replace').strip()}"


def _of_config_file(environ: Mapping[str, str], working_dir: str) -> dict[str, object]:
    name = environ.get("USERS_SYNC_CONFIG", "").strip() or "config.toml"
    text = _text(os.path.join(working_dir, name))  # noqa: PTH118  importing pathlib takes longer
    if not text:
        return {}
    import tomllib  # noqa: PLC0415  takes as long as all the rest, and most have no such file

    section = tomllib.loads(text).get("http", {})
    return {name: section[name] for name in ("host", "port") if name in section}


def _text(path: str) -> str:
    """Read a file; one that is not there is empty."""
    try:
        with open(path, encoding="utf-8-sig") as file:  # noqa: PTH123  as above
            return file.read()
    except FileNotFoundError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
