"""What the worker needs is what it says it needs: declared, used, permissively licensed.

No substitute for an audit against a database of advisories, which needs a network and gives
another answer tomorrow.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.support.places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

# Parts of a declared library in distributions of their own, which it pins itself.
PARTS = {"pydantic-core": "pydantic"}

# Distributions that share one package, by what of it is whose; the rest is the first one's.
SHARED = {
    "opentelemetry": "opentelemetry-api",
    "opentelemetry.exporter": "opentelemetry-exporter-otlp-proto-http",
    "opentelemetry.proto": "opentelemetry-proto",
    "opentelemetry.sdk": "opentelemetry-sdk",
}

# What would bind a program that only imports it. Some licences are not named in a word.
BINDING = re.compile(
    r"(?<!L)GPL|(?<!Lesser )General Public License|Affero|SSPL|BUSL|Business Source|Proprietary",
    re.IGNORECASE,
)

# Advisories that would concern us, as they were known in 2026: what no bound may let in.
KNOWN_BAD = {
    "certifi": "<2024.7.4",  # GHSA-248v-346w-9cwc: a root that is not to be trusted
    "h11": "<0.16",  # CVE-2025-43859: chunks that end otherwise than they should
    "idna": "<3.7",  # CVE-2024-3651: quadratic time
    "orjson": "<3.9.15",  # CVE-2024-27454: nesting without end
    "pydantic": "<2.4",  # CVE-2024-3772: a slow regular expression
    "requests": "<2.32.4",  # CVE-2024-47081: a password of ~/.netrc for another host
    "urllib3": "<2.6",  # CVE-2025-66418: an answer that is unpacked without end
    "waitress": "<3.0.1",  # CVE-2024-49768, CVE-2024-49769: a race, and busy sockets
}


def requirements(*extras: str) -> list[Requirement]:
    optional = PROJECT["optional-dependencies"]
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in optional[extra])]
    return [Requirement(text) for text in texts]


def declared(*extras: str) -> set[str]:
    return {canonicalize_name(each.name) for each in requirements(*extras)}


# Another Python runs it, which has what it compares us with.
ELSEWHERE = ROOT / "tests" / "bench" / "dlt_merge.py"


def imported(folder: Path) -> set[str]:
    """Give the distributions whose packages the modules of a folder import."""
    owners = packages_distributions()
    own = sys.stdlib_module_names | {"worker", "tests"}
    paths = set(folder.rglob("*.py")) - {ELSEWHERE}
    modules = {name for path in paths for name in modules_of(path)}
    foreign = {name for name in modules if name.partition(".")[0] not in own}
    distributions = {SHARED.get(name) or owners[name.partition(".")[0]][0] for name in foreign}
    return {PARTS.get(name, name) for name in map(canonicalize_name, distributions)}


def modules_of(path: Path) -> Iterator[str]:
    """Give the packages that a module imports; of a shared one the part that tells whose it is."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (package_of(alias.name) for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield package_of(module)


def package_of(module: str) -> str:
    first, part = module.partition(".")[0], ".".join(module.split(".")[:2])
    return part if part in SHARED else first


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    assert imported(ROOT / "worker") == declared("embedded", "fleet", "otel")


def test_what_the_tests_import_is_declared() -> None:
    assert imported(ROOT / "tests") - declared("embedded", "fleet", "otel", "test") == set()


def installed(name: str, extras: frozenset[str] = frozenset()) -> Iterator[Distribution]:
    """Give a distribution and all that it needs, as installed here."""
    seen: set[str] = set()
    waiting = [(name, extras)]
    while waiting:
        name, extras = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        found = distribution(name)
        yield found
        for requirement in map(Requirement, found.requires or ()):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in {"", *extras}):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))


@pytest.fixture(scope="module")
def everything() -> dict[str, Distribution]:
    """Return all distributions that the worker runs on."""
    return {
        canonicalize_name(found.metadata["Name"]): found
        for requirement in requirements("embedded", "fleet", "otel")
        for found in installed(canonicalize_name(requirement.name), frozenset(requirement.extras))
    }


def licence_of(found: Distribution) -> str:
    said = found.metadata
    classifiers = [text for text in said.get_all("Classifier", ()) if text.startswith("License ::")]
    named = [said[name][:99] for name in ("License-Expression", "License") if name in said]
    return " ".join([*named, *classifiers])


def test_no_licence_binds_who_imports(everything: dict[str, Distribution]) -> None:
    licences = {name: licence_of(found) for name, found in everything.items()}
    assert licences.keys() >= declared("embedded", "fleet", "otel")
    assert {name: text for name, text in licences.items() if BINDING.search(text)} == {}


@pytest.mark.parametrize(
    ("licence", "binds"),
    [
        ("GPL-3.0-or-later", True),
        ("License :: OSI Approved :: GNU Affero General Public License v3", True),
        ("License :: OSI Approved :: GNU General Public License v2 (GPLv2)", True),
        ("License :: Other/Proprietary License", True),
        ("LGPL-3.0-only", False),
        ("License :: OSI Approved :: GNU Lesser General Public License v3 (LGPLv3)", False),
        ("MIT OR Apache-2.0", False),
        ("", False),
    ],
)
def test_binding_licence_is_known_by_its_name(licence: str, *, binds: bool) -> None:
    assert bool(BINDING.search(licence)) is binds


def test_nothing_known_to_be_bad_is_installed(everything: dict[str, Distribution]) -> None:
    versions = {name: everything[name].version for name in KNOWN_BAD.keys() & everything.keys()}
    bad = {n: v for n, v in versions.items() if SpecifierSet(KNOWN_BAD[n]).contains(v)}
    assert bad == {}


def test_no_bound_lets_in_what_is_known_to_be_bad() -> None:
    for requirement in requirements("embedded", "fleet", "otel"):
        bad = KNOWN_BAD.get(canonicalize_name(requirement.name))
        if bad is not None:
            last_bad = bad.removeprefix("<")
            assert not requirement.specifier.contains(f"{last_bad}.dev0", prereleases=True)
