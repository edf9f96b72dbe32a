"""What is built to be published: nothing that it names is left out, and no link leads nowhere."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

from tests.support.places import ROOT

README = (ROOT / "README.md").read_text("utf-8")
LINK = re.compile(r"\]\(([^)]+)\)")
# A path of this project in code: a known folder or file, and what may follow.
PATH = re.compile(r"`(\.?[\w-]+(?:/[\w.-]+)+|[A-Z][\w.]+|[\w.-]+\.toml)`")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build both as `python -m build` does, with the build backend that is installed here."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-t", "wheel"]
    subprocess.run([*command, "-d", folder], cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def source(built: Path) -> set[str]:
    """Return the files of the source distribution."""
    [archive] = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        return {name.partition("/")[2] for name in opened.getnames()}


@pytest.fixture(scope="module")
def wheel(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the wheel, as an installer does."""
    [archive] = built.glob("*.whl")
    folder = tmp_path_factory.mktemp("wheel")
    shutil.unpack_archive(archive, folder, "zip")
    return folder


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    [file] = wheel.glob("*.dist-info/METADATA")
    return message_from_string(file.read_text("utf-8"))


def named_by_readme() -> set[str]:
    """Give the files that the README links to, or names in code and that are there."""
    linked = {link.partition("#")[0] for link in LINK.findall(README) if "://" not in link}
    return linked | {path for path in PATH.findall(README) if (ROOT / path).is_file()}


def test_source_distribution_has_all_that_the_readme_names(source: set[str]) -> None:
    named = named_by_readme()
    assert {"docs/deploying.md", "config.example.toml", ".ci/run"} <= named
    assert named - source == set()


def test_source_distribution_has_code_and_tests_whole(source: set[str]) -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in ("worker", "tests", "docs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files - source == set()


def test_readme_of_the_index_page_has_no_link_into_the_repository(metadata: Message) -> None:
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = str(metadata.get_payload())
    assert [link for link in LINK.findall(text) if not link.startswith(("https://", "#"))] == []


def test_readme_of_the_index_page_still_names_every_file(metadata: Message) -> None:
    text = str(metadata.get_payload())
    links = [link for link in LINK.findall(README) if "://" not in link]
    assert [link for link in links if f"(`{link}`)" not in text] == []
    # Nothing else is changed.
    assert text.count("\n") == README.count("\n")


def test_metadata_says_who_and_what(metadata: Message) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert metadata["Author"] == project["authors"][0]["name"]
    assert metadata["Keywords"].split(",") == sorted(project["keywords"])
    assert metadata.get_all("Classifier") == sorted(project["classifiers"])
    extras = {"embedded", "fleet", "otel", "test", "dev"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras


def launched(folder: Path, cwd: Path, *arguments: str) -> str:
    """Run the command as its script does, with this folder as what is installed."""
    code = f"import site; site.addsitedir({str(folder)!r}); from users_sync import main; main()"
    # Neither of the environment that the tests run in, nor of the folder that they run from.
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    return ended.stdout


def test_wheel_keeps_out_of_the_way_of_others_and_they_out_of_its(
    wheel: Path, tmp_path: Path
) -> None:
    [info] = wheel.glob("*.dist-info")
    assert set(wheel.iterdir()) == {wheel / "users_sync", info}
    assert (info / "entry_points.txt").read_text() == (
        "[console_scripts]\nusers-sync = users_sync:main\n"
    )
    (wheel / "worker.py").write_text("raise SystemExit('another distribution')")
    # It needs the files that are no modules.
    assert "create table" in launched(wheel, tmp_path, "init", "--print-sql")
    assert (wheel / "users_sync" / "worker" / "service" / "status_page.html").is_file()


def test_editable_install_runs_the_files_of_this_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel:editable"]
    subprocess.run([*command, "-d", tmp_path], cwd=ROOT, check=True, capture_output=True)
    [archive] = tmp_path.glob("*.whl")
    shutil.unpack_archive(archive, tmp_path, "zip")
    assert [path.name for path in (tmp_path / "users_sync").iterdir()] == ["__init__.py"]
    assert (tmp_path / "_users_sync.pth").read_text().splitlines() == [str(ROOT)]
    assert launched(tmp_path, tmp_path, "--version").startswith("users-sync ")
