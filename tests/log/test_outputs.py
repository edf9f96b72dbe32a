"""Whatever becomes of stdout and stderr: the work is done, and the exit code says what was done."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import F_SETPIPE_SZ, fcntl
from pathlib import Path
from typing import IO, Any

import httpx
import pytest

from tests.service.test_service_process import live
from tests.support.ports import free_port
from tests.support.processes import PATIENCE_SECONDS, Site, command, opened_site
from tests.support.waiting import until
from worker.store.migrate import creation_sql

FULL = Path("/dev/full")
NAME = "Žofie 李"


@pytest.fixture
def site(database_url: str, tmp_path: Path) -> Iterator[Site]:
    with opened_site(database_url, tmp_path) as site:
        yield site


def sh(site: Site, script: str, **variables: str) -> tuple[int, str, str]:
    """Run a line of the shell in which `$worker` is the command."""
    environ = {**site.shell.environ(), **variables, "worker": " ".join(command())}
    ended = subprocess.run(
        ["/bin/bash", "-c", script],
        cwd=site.shell.folder,
        env=environ,
        capture_output=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    return ended.returncode, ended.stdout.decode(), ended.stderr.decode()


@contextmanager
def started(site: Site, stdout: int, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start the long-running worker with this stdout."""
    environ = {**site.shell.environ(), **variables}
    with subprocess.Popen(
        command(), cwd=site.shell.folder, env=environ, stdout=stdout, stderr=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def full_pipe() -> Iterator[tuple[IO[bytes], int]]:
    """Give both ends of a pipe that takes nothing until it is read."""
    reading, writing = os.pipe()
    fcntl(writing, F_SETPIPE_SZ, 4096)
    os.write(writing, b"\n" * 4096)
    with os.fdopen(reading, "rb") as reader:
        try:
            yield reader, writing
        finally:
            with suppress(OSError):
                os.close(writing)


# A reader that stalls


def test_log_that_nobody_reads_stops_neither_the_work_nor_the_end(site: Site) -> None:
    site.project.populate(5)
    with full_pipe() as (_, stdout), started(site, stdout) as worker:
        until("everybody has a row", lambda: live(site) == set(site.project.ids()))
        created = site.project.create()
        until("the new user has a row", lambda: created in live(site))
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(PATIENCE_SECONDS) == 0
        assert worker.stderr is not None
        assert worker.stderr.read() == b""
        assert site.rows("select holder from users_sync_worker.lease") == [(None,)]


def test_one_sweep_ends_although_nobody_reads_its_log(site: Site) -> None:
    site.project.populate(5)
    with full_pipe() as (_, stdout):
        ended = subprocess.run(
            command("--once"),
            cwd=site.shell.folder,
            env=site.shell.environ(),
            stdout=stdout,
            stderr=stdout,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
    assert (ended.returncode, live(site)) == (0, set(site.project.ids()))


def test_output_of_a_command_waits_for_its_reader(site: Site) -> None:
    with (
        full_pipe() as (reader, stdout),
        subprocess.Popen(
            command("init", "--print-sql"),
            cwd=site.shell.folder,
            env=site.shell.environ(),
            stdout=stdout,
        ) as process,
    ):
        os.close(stdout)
        with pytest.raises(subprocess.TimeoutExpired):  # much longer than any other end takes
            process.wait(6)
        text = reader.read().decode().strip()
        assert process.wait(PATIENCE_SECONDS) == 0
    assert text.endswith(creation_sql("neon_auth").strip())


def test_error_ends_the_command_although_nobody_reads_it(site: Site) -> None:
    with full_pipe() as (_, stderr):
        ended = subprocess.run(
            command("--once", "--config", "nowhere.toml"),
            cwd=site.shell.folder,
            env=site.shell.environ(),
            stderr=stderr,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
    assert ended.returncode == 2


def test_lines_that_were_dropped_are_told_of_when_the_log_is_read_again(site: Site) -> None:
    port = str(free_port())
    variables = {
        "USERS_SYNC_HTTP__PORT": port,
        "USERS_SYNC_LOG__LEVEL": "debug",
        "USERS_SYNC_STACK__PAGE_SIZE": "3",
    }
    site.project.populate(300)
    with full_pipe() as (reader, stdout), started(site, stdout, **variables) as worker:
        until("lines are dropped", lambda: dropped(port) > 0)
        os.close(stdout)
        line: dict[str, Any] = {}
        while line.get("event") != "log.dropped":
            text = reader.readline()
            assert text
            line = json.loads(text) if text.strip() else {}
        assert line["lines"] > 0
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(PATIENCE_SECONDS) == 0


def dropped(port: str) -> float:
    with suppress(httpx.HTTPError):
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        [line] = [one for one in text.splitlines() if one.startswith("users_sync_log_lines_dro")]
        return float(line.split()[1])
    return 0


# Outputs that take nothing


@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("arguments", "code"), [("--once", 0), ("plan", 7), ("status", 2)])
def test_closed_outputs_change_no_exit_code(
    site: Site, arguments: str, code: int, streams: str
) -> None:
    site.project.populate(3)
    ended = sh(site, f"$worker {arguments} {streams}")
    assert ended[0] == code
    assert "Traceback" not in ended[1] + ended[2]
    assert len(ended[2].splitlines()) <= 1
    if "2>&-" in streams:  # what belongs on stderr is not printed on stdout instead
        assert "users-sync: " not in ended[1]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("arguments", "code"), [("--once", 0), ("plan", 7), ("check", 0)])
def test_full_disk_is_told_in_one_line_and_changes_no_exit_code(
    site: Site, arguments: str, code: int, unbuffered: str
) -> None:
    site.project.populate(3)
    assert sh(site, f"$worker {arguments} >{FULL}", PYTHONUNBUFFERED=unbuffered) == (
        code,
        "",
        "users-sync: stdout could not be written: No space left on device\n",
    )
    assert sh(site, f"$worker {arguments} >{FULL} 2>&1") == (code, "", "")


@pytest.mark.parametrize(
    ("arguments", "code"), [("--once", 0), ("plan", 7), ("status", 0), ("--help", 0)]
)
def test_broken_pipe_is_quiet_and_changes_no_exit_code(
    site: Site, arguments: str, code: int
) -> None:
    site.project.populate(3)
    if arguments == "status":
        assert sh(site, "$worker --once")[0] == 0
    script = f"$worker {arguments} | true; exit ${{PIPESTATUS[0]}}"
    assert sh(site, script) == (code, "", "")


@pytest.mark.parametrize("encoding", ["iso-8859-1", "ascii", "cp1252", "utf-8"])
def test_characters_that_the_output_lacks_are_escaped(site: Site, encoding: str) -> None:
    site.project.create(display_name=NAME)
    assert sh(site, "$worker --once")[0] == 0
    site.project.edit(site.project.ids()[0], display_name=NAME * 2)
    code, stdout, stderr = sh(
        site,
        "$worker plan --values | iconv -f $PYTHONIOENCODING -t utf-8; exit ${PIPESTATUS[0]}",
        PYTHONIOENCODING=encoding,
    )
    assert (code, stderr) == (7, "")
    shown = (NAME * 2).encode(encoding, "backslashreplace").decode(encoding)
    assert shown in stdout


def test_output_that_another_process_made_non_blocking_is_written_whole(site: Site) -> None:
    site.project.populate(400)
    script = """
    python3 -c 'import os, subprocess, sys, time
os.set_blocking(1, False)
sys.exit(subprocess.run(sys.argv[1:], check=False).returncode)' $worker plan |
        (sleep 1; wc -l); exit ${PIPESTATUS[0]}
    """
    code, stdout, stderr = sh(site, script)
    assert (code, stderr) == (7, "")
    assert int(stdout) >= 400
