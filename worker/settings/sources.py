"""Where the value of each setting comes from; unknown names are refused."""

import difflib
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from worker.errors import Misconfigured
from worker.settings.names import (
    API_URL,
    DATABASE_URL,
    PREFIX,
    PROJECT_ID,
    SCHEMA,
    SECRET_SERVER_KEY,
    WELL_KNOWN,
    Known,
    Names,
    Setting,
    named,
    own_variable,
    suggested,
)
from worker.settings.values import comparable

# A page size was tuned once, when servers took pages of any size.
OUTDATED: Mapping[Setting, Any] = {("stack", "page_size"): "auto"}
QUOTES: Mapping[str, str] = {'"': '"', "'": "'", "“": "”", "\u2018": "\u2019"}
CONFIG_VARIABLE = "USERS_SYNC_CONFIG"
_WELL_KNOWN_NAMES = {name for names in WELL_KNOWN.values() for name in names}


@dataclass(frozen=True)
class Given:
    """A value as it was found, and where; in more than one place if all say the same.

    `called` is what the person calls the setting, where that is not its section and name.
    """

    value: Any
    kind: str  # of the places, in words
    places: tuple[str, ...] = ()
    called: str = ""

    @property
    def origin(self) -> str:
        kind = f"{self.kind}s" if len(self.places) > 1 else self.kind
        return f"the {kind} {' and '.join(self.places)}".rstrip()


Layer = dict[Setting, Sequence[Given]]


def from_flags(flags: Mapping[str, Mapping[str, Any]]) -> Layer:
    """Take the flags, by section and name; None is a flag that was not given."""
    return {
        (section, name): [Given(value, "command line")]
        for section, values in flags.items()
        for name, value in values.items()
        if value is not None
    }


def from_environment(environ: Mapping[str, str], known: Known) -> Layer:
    # Compose files, shells and scaffolds set variables to nothing when they mean not to set them.
    found = {
        variable: Given(_bare(value, variable), "variable", (variable,))
        for variable, value in environ.items()
        if value.strip() and _is_ours(variable)
    }
    return _by_setting(found, known)


def from_secret_files(folder: Path, known: Known) -> Layer:
    """Read the files named like one of our variables; no folder is no source."""
    try:
        files = {file.name.upper(): file for file in sorted(folder.iterdir())}
    except OSError:
        return {}
    texts = {file: _text(file) for name, file in files.items() if _is_ours(name)}
    found = {
        file.name.upper(): Given(_bare(text, str(file)), "file", (str(file),))
        for file, text in texts.items()
        if text.strip()
    }
    return _by_setting(found, known)


def from_config_file(
    named: Path | None, environ: Mapping[str, str], working_dir: Path, known: Known
) -> Layer:
    """Read the TOML file; only the default file may be absent."""
    name = named or _bare(environ.get(CONFIG_VARIABLE, ""), CONFIG_VARIABLE)
    path = working_dir / (name or "config.toml")
    if not name and not os.path.lexists(path):
        return {}
    try:
        sections = tomllib.loads(_text(path))
    except tomllib.TOMLDecodeError as error:
        raise _misconfigured(f"{path} is not valid TOML: {error}") from None
    values = _in_sections(sections, path, known)
    return {
        setting: [Given(_bare(value, f"{path}: {'.'.join(setting)}"), "file", (str(path),))]
        for setting, value in values
    }


def agreed(given: Mapping[Setting, Sequence[Given]]) -> dict[Setting, Given]:
    """Join what several names say of one setting. Raises Misconfigured where they disagree."""
    joined = {}
    for setting, found in given.items():
        first = found[0]
        for other in found[1:]:
            if comparable(setting, other.value) != comparable(setting, first.value):
                raise _misconfigured(
                    f"{first.places[0]} and {other.places[0]} disagree about {'.'.join(setting)}:"
                    f" unset one of them, or set {own_variable(setting)}, which wins over both"
                )
        places = tuple(place for each in found for place in each.places)
        joined[setting] = Given(first.value, first.kind, places)
    return joined


def without_outdated(given: Mapping[Setting, Given]) -> dict[Setting, Given]:
    """Leave out values that were good once: the defaults take their place."""
    return {setting: each for setting, each in given.items() if OUTDATED.get(setting) != each.value}


def variables(setting: Setting) -> tuple[str, ...]:
    """Give the variables that set a setting, strongest first."""
    return (own_variable(setting), *WELL_KNOWN.get(setting, ()))


def nested(given: Mapping[Setting, Given]) -> dict[str, dict[str, Any]]:
    """Give the values by section and name."""
    sections: dict[str, dict[str, Any]] = {}
    for (section, name), found in given.items():
        sections.setdefault(section, {})[name] = found.value
    return sections


def names_of(given: Mapping[Setting, Given]) -> Names:
    """Say by which variables or files the settings of the project were set."""
    names = []
    for setting in (API_URL, PROJECT_ID, SECRET_SERVER_KEY, DATABASE_URL, SCHEMA):
        found = given.get(setting)
        called = found.called if found else ""
        names.append(called or named(setting, found.places if found else ()))
    return Names(*names)


def refused(error: ValidationError, given: Mapping[Setting, Given]) -> Misconfigured:
    """Say in one line what is wrong with the first setting, and how many more are wrong."""
    reasons: dict[Setting, list[str]] = {}
    for detail in error.errors(include_url=False, include_input=False):
        reason = detail["msg"].removeprefix("Value error, ").replace("Input should", "should")
        # Of the place only section and name, not the branch of a union nor the place in a list.
        checked = detail.get("ctx", {}).get("setting")
        place = (*detail["loc"], checked) if checked else detail["loc"]
        reasons.setdefault(tuple(str(part) for part in place[:2]), []).append(reason)
    setting = next(iter(reasons))
    found = given.get(setting)
    origin = f" (from {found.origin})" if found else ""
    called = (found and found.called) or f"{'.'.join(setting)}{origin}"
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    return _misconfigured(f"{called}: {' or '.join(reasons[setting])}{more}")


def misplaced_flag(setting: Setting, given: Given) -> Misconfigured:
    """Say that true or false stands where something else is meant."""
    return _misconfigured(f"{'.'.join(setting)} (from {given.origin}): should be no true or false")


def not_set(section: str, name: str) -> Misconfigured:
    """Say how to set what has no default."""
    return Misconfigured(
        f"{section}.{name} is not set: set the variable {suggested((section, name))}, put it into a"
        f' file of that name in /run/secrets, or write {name} = "..." under [{section}] in'
        " config.toml"
    )


def _bare(value: Any, place: str) -> Any:
    """Drop white space around a text, such as the line break at the end of a file.

    Raises Misconfigured for a text in quotes: what removes them in one place keeps them in another.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    if len(text) > 1 and QUOTES.get(text[0]) == text[-1]:
        raise _misconfigured(
            f"{place} has quotes around the whole value: remove them (docker --env-file, for one,"
            " takes quotes as part of the value)"
        )
    return text


def _is_ours(variable: str) -> bool:
    """Whether a variable is a setting, or means to be one.

    Without `__` it is not: Kubernetes sets USERS_SYNC_PORT, and more, for a Service of our name.
    """
    return (variable.startswith(PREFIX) and "__" in variable) or variable in _WELL_KNOWN_NAMES


def _by_setting(found: Mapping[str, Given], known: Known) -> Layer:
    """Sort what was found by variable; our own name of a setting wins over the well-known ones."""
    names = [name for names in known.values() for name in names]
    for variable in found:
        if variable not in names:
            raise unknown("unknown variable", variable, names)
    return {
        setting: [found[names[0]]] if names[0] in found else well_known
        for setting, names in known.items()
        if (well_known := [found[name] for name in names if name in found])
    }


def _in_sections(
    given: Mapping[str, Any], path: Path, known: Known
) -> Iterator[tuple[Setting, Any]]:
    sections = {section for section, _ in known}
    dotted = [".".join(setting) for setting in known]
    for section, values in given.items():
        if section in sections and not isinstance(values, dict):
            raise _misconfigured(f"{path}: {section} should be a section, [{section}]")
        if not isinstance(values, dict):
            raise unknown(f"{path}: unknown setting", section, dotted)
        if section not in sections:
            raise unknown(f"{path}: unknown section", section, sections)
        for name, value in values.items():
            if (section, name) not in known:
                raise unknown(f"{path}: unknown setting", f"{section}.{name}", dotted)
            yield (section, name), value


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")  # Windows editors begin files with a BOM
    except OSError as error:
        raise _misconfigured(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:  # it carries the file's bytes
        raise _misconfigured(f"{path} cannot be read: it is not UTF-8") from None


def unknown(what: str, name: str, known: Iterable[str]) -> Misconfigured:
    """Say that there is no such name, and which one may have been meant."""
    closest = difflib.get_close_matches(name, known, n=1)
    return _misconfigured(
        f"{what} {name}; " + (f"did you mean {closest[0]}?" if closest else "remove it")
    )


def _misconfigured(message: str) -> Misconfigured:
    # Names of files and keys may hold line breaks.
    return Misconfigured(" ".join(message.split()))
