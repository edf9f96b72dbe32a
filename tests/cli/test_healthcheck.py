"""The image's health check: it asks where the worker listens, and takes next to nothing."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from tests.support.worker_samples import Ticks, sample_vitals
from worker.cli import healthcheck
from worker.cli.healthcheck import address, trouble
from worker.service.endpoints import web_server
from worker.service.health import Health
from worker.service.metrics import Metrics
from worker.settings.settings import load_settings

LOOPBACK = "127.0.0.1"
# What each of these modules takes is more than all that the check needs.
EXPENSIVE = {"worker", "asyncio", "email", "http", "logging", "pathlib", "ssl", "tomllib", "typing"}


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()


@pytest.fixture
def health(ticks: Ticks) -> Health:
    health = sample_vitals(ticks)
    health.enter("working")
    return health


def run(
    folder: Path, variables: Mapping[str, str], *options: str
) -> subprocess.CompletedProcess[str]:
    """Run the check as the image does; it finds no package that was installed."""
    return subprocess.run(
        [sys.executable, "-I", "-S", *options, healthcheck.__file__],
        env={"PATH": os.defpath, **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_tells_by_its_exit_code_whether_the_worker_is_alive(
    health: Health, ticks: Ticks, tmp_path: Path
) -> None:
    with web_server(LOOPBACK, 0, health, Metrics(health.read)) as server:
        variables = {"USERS_SYNC_HTTP__HOST": "0.0.0.0", "USERS_SYNC_HTTP__PORT": str(server.port)}
        alive = run(tmp_path, variables)
        ticks.seconds = 31
        stuck = run(tmp_path, variables)
    gone = run(tmp_path, variables)
    assert (alive.returncode, alive.stdout, alive.stderr) == (0, "", "")
    assert (stuck.returncode, gone.returncode) == (1, 1)
    assert stuck.stderr.startswith("not alive: /healthz says: the main loop")
    assert f"0.0.0.0 port {server.port}: " in gone.stderr


def test_imports_nothing_that_takes_long(tmp_path: Path) -> None:
    ended = run(tmp_path, {"USERS_SYNC_HTTP__PORT": "1"}, "-X", "importtime")
    imported = set(re.findall(r"\| +(\w+)(?:\.\w+)*$", ended.stderr, re.MULTILINE))
    assert "socket" in imported
    assert imported & EXPENSIVE == set()


def test_without_endpoints_there_is_nothing_to_ask(tmp_path: Path) -> None:
    assert run(tmp_path, {"USERS_SYNC_HTTP__PORT": "0"}).returncode == 0


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"USERS_SYNC_HTTP__PORT": "'80'"}, "invalid literal for int"),
        ({"USERS_SYNC_CONFIG": "."}, "Is a directory"),
        ({"USERS_SYNC_CONFIG": "odd.toml"}, "at line 1"),
    ],
)
def test_settings_that_cannot_be_read_are_one_line(
    variables: dict[str, str], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "odd.toml").write_text("= 1")
    ended = run(tmp_path, variables)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert ended.stderr.startswith("not alive: the settings of [http] cannot be read: ")
    assert reason in ended.stderr


@pytest.mark.parametrize("environ", [{}, {"HTTP__PORT": "81"}, {"HTTP__PORT": " "}])
@pytest.mark.parametrize("secret", ["", "82\n"])
@pytest.mark.parametrize(
    "config",
    ["", "[http]\nport = 83\n", '\ufeff[http]\nhost = "::1"\nport = " 84 "\n', "[log]\n"],
    ids=["none", "port", "both", "neither"],
)
@pytest.mark.parametrize("name", ["config.toml", "other.toml"])
def test_address_is_that_of_the_settings(
    environ: dict[str, str], secret: str, config: str, name: str, tmp_path: Path
) -> None:
    variables = {f"USERS_SYNC_{key}": value for key, value in environ.items()}
    if config:
        (tmp_path / name).write_text(config, encoding="utf-8")
        variables |= {"USERS_SYNC_CONFIG": name} if name != "config.toml" else {}
    secrets = tmp_path / "secrets"
    if secret:
        secrets.mkdir()
        (secrets / "USERS_SYNC_HTTP__PORT").write_text(secret)
    settings = load_settings(
        config=None,
        overrides={},
        environ=variables,
        secrets_dir=secrets,
        working_dir=tmp_path,
    ).http
    found = address(variables, str(secrets), str(tmp_path))
    assert found == (settings.host, settings.port)


@pytest.mark.parametrize(
    ("host", "asked"),
    [("0.0.0.0", ["0.0.0.0", "127.0.0.1"]), ("::", ["::", "::1", "127.0.0.1"]), ("::1", ["::1"])],
)
def test_finds_the_server_wherever_it_listens(health: Health, host: str, asked: list[str]) -> None:
    if ":" in host and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    with web_server(host, 0, health, Metrics(health.read)) as server:
        assert [trouble(each, server.port) for each in asked] == [None] * len(asked)


@pytest.mark.parametrize("answer", [b"SSH-2.0-nonsense\r\n", b"\xff\xfe", b""])
def test_what_is_no_http_is_not_alive(answer: bytes) -> None:
    with answering(answer) as port:
        assert str(trouble(LOOPBACK, port)).startswith("/healthz says: ")


def test_host_that_is_none_is_not_alive() -> None:
    assert str(trouble("a" * 64, 8080)).startswith("a" * 64)


@contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """Give the port of a server that answers once, with these bytes."""
    with socket.create_server((LOOPBACK, 0)) as listening:

        def answer_once() -> None:
            conn, _ = listening.accept()
            with conn:
                conn.recv(1000)
                conn.sendall(answer)

        thread = Thread(target=answer_once)
        thread.start()
        yield int(listening.getsockname()[1])
        thread.join()


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True
