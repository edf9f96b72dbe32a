"""Where settings come from, which are refused, and that no refusal gives a secret away."""

import re
import tomllib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.support.places import ROOT
from worker.errors import Misconfigured
from worker.settings.names import Names
from worker.settings.settings import (
    DatabaseSettings,
    LogSettings,
    Settings,
    StackSettings,
    load_settings,
)
from worker.store.migrate import OWN_SCHEMA

KEY = "ssk_hush_hush"
URL = "postgresql://me:hush%20hush@db.example.com:5432/app?sslmode=require"
EXAMPLE = ROOT / "config.example.toml"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "secrets").mkdir()
    return tmp_path


def load(here: Path, environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
    return load_settings(
        config=None,
        overrides=overrides,
        environ=environ or {},
        secrets_dir=here / "secrets",
        working_dir=here,
    )


def refusal(here: Path, environ: Mapping[str, str] | None = None, **overrides: Any) -> str:
    with pytest.raises(Misconfigured) as caught:
        load(here, environ, **overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert "hush" not in message
    return message


# Where a value comes from


def test_nothing_given_means_defaults(here: Path) -> None:
    assert load(here) == Settings()
    assert load(here).stack.page_size == 1_000


def test_missing_secrets_folder_is_no_source(here: Path) -> None:
    (here / "secrets").rmdir()
    assert load(here) == Settings()
    (here / "secrets").write_text("a file where a folder is expected")
    assert load(here) == Settings()


def test_each_source_wins_over_the_next(here: Path) -> None:
    environ: dict[str, str] = {}
    seen = [load(here, environ).stack.project_id]
    (here / "config.toml").write_text('[stack]\nproject_id = "from-file"\npage_size = 7\n')
    seen.append(load(here, environ).stack.project_id)
    (here / "secrets" / "stack_project_id").write_text("from-secret\n")
    seen.append(load(here, environ).stack.project_id)
    environ["STACK_PROJECT_ID"] = "from-well-known"
    seen.append(load(here, environ).stack.project_id)
    environ["USERS_SYNC_STACK__PROJECT_ID"] = "from-own"
    seen.append(load(here, environ).stack.project_id)
    settings = load(here, environ, stack={"project_id": "from-flag", "page_size": None})
    seen.append(settings.stack.project_id)
    assert seen == [
        None,
        "from-file",
        "from-secret",
        "from-well-known",
        "from-own",
        "from-flag",
    ]
    assert settings.stack.page_size == 7


def test_environment_wins_over_secret_files(here: Path) -> None:
    (here / "secrets" / "USERS_SYNC_DATABASE__URL").write_text("postgresql://file/a")
    url = load(here, {"DATABASE_URL": URL}).require_database()
    assert url.get_secret_value() == URL


@pytest.mark.parametrize("name", ["DATABASE_URL", "database_url", "users_sync_database__url"])
def test_secret_files_have_any_case_and_lose_their_newline(here: Path, name: str) -> None:
    (here / "secrets" / name).write_text(URL + "\r\n")
    assert load(here).require_database().get_secret_value() == URL


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DATABASE_URL", URL),
        ("STACK_SECRET_SERVER_KEY", KEY),
        ("STACK_PROJECT_ID", "p1"),
        ("STACK_API_URL", "https://stack.example.com"),
        ("USERS_SYNC_DATABASE__SCHEMA", "auth"),
    ],
)
@pytest.mark.parametrize("form", ["{}\n", "{}\r\n", "  {}\t", "\n{} "])
def test_white_space_around_a_value_is_no_part_of_it(
    here: Path, variable: str, value: str, form: str
) -> None:
    expected = load(here, {variable: value}).model_dump()
    assert expected != Settings().model_dump()
    assert load(here, {variable: form.format(value)}).model_dump() == expected
    (here / "secrets" / variable).write_text(form.format(value))
    assert load(here).model_dump() == expected


def test_white_space_around_a_value_of_the_config_file_is_no_part_of_it(here: Path) -> None:
    (here / "config.toml").write_text(f'[database]\nurl = """{URL}\n"""\n')
    assert load(here).require_database().get_secret_value() == URL


def test_white_space_around_a_name_of_a_list_is_no_part_of_it(here: Path) -> None:
    variable = "USERS_SYNC_STACK__IGNORED_FIELDS"
    for text in (" a ,b\n", '[" a", "b\\n", " "]'):
        assert load(here, {variable: text}).stack.ignored_fields == ("a", "b")
    (here / "config.toml").write_text('[stack]\nignored_fields = [" a", "b\\n", " "]\n')
    assert load(here).stack.ignored_fields == ("a", "b")
    (here / "config.toml").write_text('[stack]\nignored_fields = ["a", 1]\n')
    assert refusal(here).startswith("stack.ignored_fields ")


def test_quotes_around_the_name_of_the_config_file_are_told(here: Path) -> None:
    found = refusal(here, {"USERS_SYNC_CONFIG": '"config.toml"'})
    assert found.startswith("USERS_SYNC_CONFIG has quotes around the whole value")


@pytest.mark.parametrize("quoted", ['"{}"', "'{}'", ' "{}"\n', "“{}”"])
@pytest.mark.parametrize(
    "variable",
    [
        "DATABASE_URL",
        "STACK_SECRET_SERVER_KEY",
        "HEXCLAVE_PROJECT_ID",
        "STACK_API_URL",
        "USERS_SYNC_HTTP__PORT",
    ],
)
def test_quotes_around_a_whole_value_are_told(here: Path, variable: str, quoted: str) -> None:
    reason = "has quotes around the whole value: remove them"
    assert refusal(here, {variable: quoted.format("hush")}).startswith(f"{variable} {reason}")
    (here / "secrets" / variable).write_text(quoted.format("hush"))
    assert refusal(here).startswith(f"{here / 'secrets' / variable} {reason}")


def test_quotes_inside_the_quotes_of_toml_are_told(here: Path) -> None:
    (here / "config.toml").write_text("[stack]\nproject_id = \"'hush'\"\n")
    assert "config.toml: stack.project_id has quotes around" in refusal(here)


@pytest.mark.parametrize("url", ["host=/tmp dbname='a b'", "dbname='a'"])
def test_quotes_of_a_part_are_part_of_the_value(here: Path, url: str) -> None:
    assert load(here, {"DATABASE_URL": url}).require_database().get_secret_value() == url


@pytest.mark.parametrize(
    ("prefix", "kind"), [("pck_", "publishable client key"), ("sak_", "super secret admin key")]
)
def test_key_of_another_kind_is_told_by_its_prefix(here: Path, prefix: str, kind: str) -> None:
    message = refusal(here, {"HEXCLAVE_SECRET_SERVER_KEY": f"{prefix}hush"})
    assert "variable HEXCLAVE_SECRET_SERVER_KEY" in message
    assert kind in message
    assert "begins with ssk_" in message


@pytest.mark.parametrize("prefix", ["ssk_", "pck_", "sak_"])
def test_key_in_place_of_the_project_id_is_told(here: Path, prefix: str) -> None:
    message = refusal(here, {"STACK_PROJECT_ID": f"{prefix}hush"})
    assert "should be the project's id, but this is a key" in message


def test_project_id_in_upper_case_is_the_same_project(here: Path) -> None:
    wanted = "1B9D6BCD-BBFD-4B2D-9B5D-AB8DFBBD4BED"
    settings = load(here, {"STACK_PROJECT_ID": wanted})
    assert settings.stack.project_id == wanted.lower()


@pytest.mark.parametrize("schema", [OWN_SCHEMA, "information_schema", "pg_catalog", "pg_temp_1"])
def test_schema_of_our_own_or_of_postgres_is_refused(here: Path, schema: str) -> None:
    message = refusal(here, {"USERS_SYNC_DATABASE__SCHEMA": schema})
    assert message.startswith("database.schema (from the variable USERS_SYNC_DATABASE__SCHEMA)")
    assert "a schema for users_sync alone" in message


@pytest.mark.parametrize(
    "setting", ["http.port", "stack.page_size", "deletions.max_fraction", "schedule.poll_seconds"]
)
@pytest.mark.parametrize("flag", ["true", "false"])
def test_flag_in_place_of_a_number_is_refused(here: Path, setting: str, flag: str) -> None:
    section, name = setting.split(".")
    (here / "config.toml").write_text(f"[{section}]\n{name} = {flag}\n")
    assert "should be no true or false" in refusal(here)


def test_other_secret_files_are_not_read(here: Path) -> None:
    (here / "secrets" / "token").write_bytes(b"\xff")
    (here / "secrets" / "..data").mkdir()
    assert load(here) == Settings()


def test_unreadable_secret_file_is_refused(here: Path) -> None:
    (here / "secrets" / "DATABASE_URL").mkdir()
    assert "DATABASE_URL cannot be read: Is a directory" in refusal(here)


def test_secret_file_that_is_no_text_is_refused(here: Path) -> None:
    (here / "secrets" / "DATABASE_URL").write_bytes(b"hush\xff")
    assert "not UTF-8" in refusal(here)


def test_environment_is_upper_case_only(here: Path) -> None:
    assert load(here, {"database_url": URL, "users_sync_http__port": "1"}) == Settings()


def test_empty_variable_is_not_set(here: Path) -> None:
    (here / "secrets" / "DATABASE_URL").write_text(URL)
    (here / "secrets" / "STACK_PROJECT_ID").write_text(" \n\n")
    environ = {"DATABASE_URL": "", "USERS_SYNC_HTTP__PORT": " ", "USERS_SYNC_CONFIG": "\t"}
    settings = load(here, environ)
    assert settings.require_database().get_secret_value() == URL
    assert settings.stack.project_id is None


@pytest.mark.parametrize(
    "environ",
    [
        {"USERS_SYNC_STACK": "tcp://10.0.0.1:80", "USERS_SYNC_DATABASE": "tcp://10.0.0.1:81"},
        {"USERS_SYNC_PORT": "tcp://10.0.0.1:80", "USERS_SYNC_SERVICE_HOST": "10.0.0.1"},
    ],
)
def test_kubernetes_service_variables_are_ignored(here: Path, environ: dict[str, str]) -> None:
    assert load(here, environ) == Settings()


def test_lists_are_json_or_separated_by_commas(here: Path) -> None:
    variable = "USERS_SYNC_STACK__IGNORED_FIELDS"
    assert load(here, {variable: '["a", "b,c"]'}).stack.ignored_fields == ("a", "b,c")
    assert load(here, {variable: "a, b,"}).stack.ignored_fields == ("a", "b")
    assert load(here, {variable: "[]"}).stack.ignored_fields == ()
    assert "stack.ignored_fields" in refusal(here, {variable: "[hush"})


def test_threads_do_not_see_each_others_sources(here: Path) -> None:
    def port(number: int) -> int:
        return load(here, {"USERS_SYNC_HTTP__PORT": str(number)}).http.port

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(port, range(200))) == list(range(200))
    assert Settings().http.port == 8080


# Stack Auth and Hexclave

HOSTED = "https://api.hexclave.com"
BY_HEXCLAVE = {
    "HEXCLAVE_API_URL": HOSTED,
    "HEXCLAVE_PROJECT_ID": "p1",
    "HEXCLAVE_SECRET_SERVER_KEY": KEY,
}
BY_STACK = {name.replace("HEXCLAVE", "STACK"): value for name, value in BY_HEXCLAVE.items()}


def read_by(settings: Settings) -> tuple[str, str, str]:
    stack = settings.require_stack()
    return stack.api_url, stack.project_id, stack.secret_server_key.get_secret_value()


@pytest.mark.parametrize("environ", [BY_STACK, BY_HEXCLAVE, BY_STACK | BY_HEXCLAVE])
def test_either_name_sets_the_project(here: Path, environ: dict[str, str]) -> None:
    assert read_by(load(here, environ)) == (HOSTED, "p1", KEY)
    for name, value in environ.items():
        (here / "secrets" / name.lower()).write_text(f"{value}\n")
    assert read_by(load(here)) == (HOSTED, "p1", KEY)


@pytest.mark.parametrize("project", ["STACK", "HEXCLAVE"])
@pytest.mark.parametrize("framework", ["NEXT_PUBLIC", "VITE"])
def test_public_names_set_all_but_the_key(here: Path, framework: str, project: str) -> None:
    public = f"{framework}_{project}"
    environ = {f"{public}_API_URL": HOSTED, f"{public}_PROJECT_ID": "p1"}
    settings = load(here, environ | {f"{public}_SECRET_SERVER_KEY": KEY})
    assert (settings.stack.api_url, settings.stack.project_id) == (HOSTED, "p1")
    assert settings.stack.secret_server_key is None
    (here / "secrets" / f"{public}_SECRET_SERVER_KEY").write_text(KEY)
    assert load(here).stack.secret_server_key is None


@pytest.mark.parametrize(
    ("one", "other", "setting"),
    [
        ("STACK_PROJECT_ID", "HEXCLAVE_PROJECT_ID", "project_id"),
        ("STACK_PROJECT_ID", "NEXT_PUBLIC_STACK_PROJECT_ID", "project_id"),
        ("NEXT_PUBLIC_HEXCLAVE_PROJECT_ID", "VITE_STACK_PROJECT_ID", "project_id"),
        ("STACK_API_URL", "VITE_HEXCLAVE_API_URL", "api_url"),
        ("STACK_SECRET_SERVER_KEY", "HEXCLAVE_SECRET_SERVER_KEY", "secret_server_key"),
    ],
)
def test_names_that_disagree_are_refused_without_their_values(
    here: Path, one: str, other: str, setting: str
) -> None:
    values = {one: "https://hush.example.com", other: "https://hush.example.org"}
    own = f"USERS_SYNC_STACK__{setting.upper()}"
    end = f" disagree about stack.{setting}: unset one of them, or set {own}, which wins over both"
    assert refusal(here, values) == f"{one} and {other}{end}"
    for name, value in values.items():
        (here / "secrets" / name).write_text(value)
    assert refusal(here) == f"{here / 'secrets' / one} and {here / 'secrets' / other}{end}"


def test_the_one_of_three_names_that_disagrees_is_named(here: Path) -> None:
    environ = {"STACK_PROJECT_ID": "hush1", "HEXCLAVE_PROJECT_ID": "hush1"}
    message = refusal(here, environ | {"VITE_STACK_PROJECT_ID": "hush2"})
    assert message.startswith("STACK_PROJECT_ID and VITE_STACK_PROJECT_ID disagree")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("https://api.example.com", " HTTPS://API.example.com:443/api/v1/"),
        ("http://localhost", "http://localhost:80//"),
        ("https://example.com/stack", "https://example.com//stack/"),
    ],
)
def test_two_forms_of_one_address_agree(here: Path, one: str, other: str) -> None:
    settings = load(here, {"STACK_API_URL": one, "HEXCLAVE_API_URL": other})
    assert settings.stack.api_url == one


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("https://example.com", "http://example.com"),
        ("https://example.com/stack", "https://example.com/Stack"),
        ("https://example.com", "https://example.com:8443"),
        ("https://example.com", "https://exa mple.com"),
        ("https://example.com", "https://[hush"),
    ],
)
def test_two_addresses_disagree(here: Path, one: str, other: str) -> None:
    environ = {"STACK_API_URL": one, "HEXCLAVE_API_URL": other}
    assert refusal(here, environ).startswith("STACK_API_URL and HEXCLAVE_API_URL disagree")


def test_case_of_a_project_id_is_no_disagreement_and_that_of_a_key_is(here: Path) -> None:
    settings = load(here, {"STACK_PROJECT_ID": "ab-1", "HEXCLAVE_PROJECT_ID": "AB-1"})
    assert settings.stack.project_id == "ab-1"
    keys = {"STACK_SECRET_SERVER_KEY": KEY, "HEXCLAVE_SECRET_SERVER_KEY": KEY.upper()}
    assert "disagree" in refusal(here, keys)


def test_empty_names_of_a_scaffold_are_not_set(here: Path) -> None:
    empty = dict.fromkeys([*BY_STACK, "NEXT_PUBLIC_STACK_PROJECT_ID"], "")
    assert read_by(load(here, BY_HEXCLAVE | empty)) == (HOSTED, "p1", KEY)
    blank = dict.fromkeys(BY_HEXCLAVE, "  ")
    assert read_by(load(here, BY_STACK | blank)) == (HOSTED, "p1", KEY)
    assert load(here, empty | blank) == Settings()


def test_own_name_ends_a_disagreement(here: Path) -> None:
    environ = {"STACK_PROJECT_ID": "a", "HEXCLAVE_PROJECT_ID": "b"}
    own = {"USERS_SYNC_STACK__PROJECT_ID": "c"}
    assert load(here, environ | own).stack.project_id == "c"
    for name, value in environ.items():
        (here / "secrets" / name).write_text(value)
    assert load(here, own).stack.project_id == "c"


def test_names_in_different_sources_do_not_disagree(here: Path) -> None:
    (here / "config.toml").write_text('[stack]\nproject_id = "from-file"\n')
    (here / "secrets" / "HEXCLAVE_PROJECT_ID").write_text("from-secret")
    assert load(here).stack.project_id == "from-secret"
    assert load(here, {"STACK_PROJECT_ID": "from-variable"}).stack.project_id == "from-variable"


def test_settings_are_called_by_the_names_that_set_them(here: Path) -> None:
    config, secret = here / "config.toml", here / "secrets" / "hexclave_secret_server_key"
    secret.write_text(KEY)
    names = load(here, {"HEXCLAVE_PROJECT_ID": "p1"}).require_stack().names
    assert names == Names(
        api_url="stack.api_url (STACK_API_URL or HEXCLAVE_API_URL)",
        project_id="stack.project_id (HEXCLAVE_PROJECT_ID)",
        secret_server_key=f"stack.secret_server_key ({secret})",
    )
    config.write_text(f'[stack]\napi_url = "{HOSTED}"\n')
    both = {"STACK_PROJECT_ID": "p1", "VITE_STACK_PROJECT_ID": "p1"}
    names = load(here, both).require_stack().names
    assert names.api_url == f"stack.api_url ({config})"
    assert names.project_id == "stack.project_id (STACK_PROJECT_ID and VITE_STACK_PROJECT_ID)"


def test_error_about_a_value_names_all_variables_that_hold_it(here: Path) -> None:
    both = {"STACK_PROJECT_ID": "hush hush", "HEXCLAVE_PROJECT_ID": "hush hush"}
    message = refusal(here, both)
    assert "(from the variables STACK_PROJECT_ID and HEXCLAVE_PROJECT_ID): should" in message


# The file


def test_named_file_is_read_instead_of_the_usual_one(here: Path) -> None:
    (here / "config.toml").write_text("[http]\nport = 1\n")
    (here / "two.toml").write_text("\ufeff[http]\nport = 2\n", "utf-8")
    (here / "three.toml").write_text("[http]\nport = 3\n")
    environ = {"USERS_SYNC_CONFIG": str(here / "two.toml")}
    flag = load_settings(
        config=here / "three.toml", overrides={}, environ=environ, secrets_dir=here / "none"
    )
    assert (load(here).http.port, load(here, environ).http.port, flag.http.port) == (1, 2, 3)


def test_named_file_that_is_absent_is_refused(here: Path) -> None:
    message = refusal(here, {"USERS_SYNC_CONFIG": "other.toml"})
    assert message.endswith("other.toml cannot be read: No such file or directory")


def test_broken_toml_names_file_line_and_reason(here: Path) -> None:
    (here / "config.toml").write_text('[stack]\nsecret_server_key = "hush\n')
    message = refusal(here)
    assert f"{here / 'config.toml'} is not valid TOML" in message
    assert "at line 2" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[stack]\npage_sise = 5",
            "unknown setting stack.page_sise; did you mean stack.page_size?",
        ),
        ("[stak]\npage_size = 5", "unknown section stak; did you mean stack?"),
        ("page_size = 5", "unknown setting page_size; did you mean stack.page_size?"),
        ("[stack]\nlease_seconds = 5", "did you mean database.lease_seconds?"),
        ("[http]\nzzz = 5", "unknown setting http.zzz; remove it"),
        ("stack = 5", "stack should be a section, [stack]"),
        ("[[stack]]", "stack should be a section, [stack]"),
        ('"a\\nb" = 5', "unknown setting a b"),
    ],
)
def test_unknown_setting_names_the_closest(here: Path, text: str, expected: str) -> None:
    (here / "config.toml").write_text(text)
    message = refusal(here)
    assert expected in message
    assert str(here / "config.toml") in message


@pytest.mark.parametrize(
    ("variable", "closest"),
    [
        ("USERS_SYNC_STAK__API_URL", "USERS_SYNC_STACK__API_URL"),
        ("USERS_SYNC_HTTP__PROT", "USERS_SYNC_HTTP__PORT"),
        ("USERS_SYNC__HTTP__PORT", "USERS_SYNC_HTTP__PORT"),
        ("USERS_SYNC_DATABASE__SCHEMA_NAME", "USERS_SYNC_DATABASE__SCHEMA"),
    ],
)
def test_unknown_variable_names_the_closest(here: Path, variable: str, closest: str) -> None:
    expected = f"unknown variable {variable}; did you mean {closest}?"
    assert refusal(here, {variable: "hush"}) == expected
    (here / "secrets" / variable.lower()).write_text("hush")
    assert refusal(here) == expected


# What is refused


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("stack.page_size", "2"),
        ("stack.page_size", "30001"),
        ("stack.page_size", "fast"),
        ("stack.timeout_seconds", "0"),
        ("stack.retry_minutes", "-1"),
        ("stack.retry_minutes", "inf"),
        ("stack.include_anonymous", "perhaps"),
        ("stack.ignored_fields", "locale,primary_email"),
        ("stack.project_id", "two words"),
        ("database.schema", "x" * 64),
        ("database.schema", "a\0b"),
        ("database.lease_seconds", "2"),
        ("schedule.poll_seconds", "0"),
        ("schedule.poll_page_size", "2"),
        ("schedule.sweep_seconds", "nan"),
        ("schedule.sweep_share", "1.1"),
        ("schedule.sweep_share", "1e-300"),
        ("schedule.poll_share", "1.1"),
        ("schedule.poll_share", "1e-300"),
        ("schedule.audit_hours", "8761"),
        ("schedule.resume_minutes", "1e300"),
        ("schedule.resume_minutes", "-1"),
        ("deletions.max_fraction", "1.1"),
        ("deletions.max_count", "-1"),
        ("deletions.max_count", "9" * 30),
        ("deletions.grace_seconds", "-1"),
        ("log.level", "loud"),
        ("log.format", "xml"),
        ("http.port", "65536"),
    ],
)
def test_values_out_of_bounds_name_setting_and_variable(
    here: Path, setting: str, value: str
) -> None:
    variable = "USERS_SYNC_" + setting.replace(".", "__").upper()
    message = refusal(here, {variable: value})
    assert message.startswith(f"{setting} (from the variable {variable}): should ")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("stack.page_size", "3"),
        ("stack.page_size", "30000"),
        ("stack.retry_minutes", "0"),
        ("database.schema", "ü" * 31),
        ("database.lease_seconds", "3"),
        ("database.url", "embedded"),
        ("database.url", "host=/tmp dbname=app"),
        ("schedule.poll_seconds", "0.01"),
        ("deletions.grace_seconds", "0"),
        ("deletions.max_fraction", "0"),
        ("log.level", "DEBUG"),
        ("http.port", "0"),
    ],
)
def test_values_at_the_bounds_are_taken(here: Path, setting: str, value: str) -> None:
    load(here, {"USERS_SYNC_" + setting.replace(".", "__").upper(): value})


def test_several_errors_are_one_line(here: Path) -> None:
    (here / "config.toml").write_text('[http]\nport = "x"\n[stack]\npage_size = "fast"\n')
    message = refusal(here, {"USERS_SYNC_DATABASE__LEASE_SECONDS": "1"})
    assert message.startswith(f"stack.page_size (from the file {here / 'config.toml'}): should ")
    assert message.endswith("(and 2 more)")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("https://api.example.com", "https://api.example.com"),
        (" https://api.example.com/// ", "https://api.example.com"),
        ("https://api.example.com/api/v1/", "https://api.example.com"),
        ("https://example.com/stack/api/v1", "https://example.com/stack"),
        ("http://localhost:8102", "http://localhost:8102"),
        ("http://127.8.9.10/api/v1", "http://127.8.9.10"),
        ("http://[::1]:8102/", "http://[::1]:8102"),
        ("https://example.com//stack///x//", "https://example.com/stack/x"),
        ("https://example.com//api//v1", "https://example.com"),
        ("https://api.hexclave.com", "https://api.hexclave.com"),
    ],
)
def test_api_url_is_kept_as_a_base(here: Path, given: str, kept: str) -> None:
    assert load(here, {"STACK_API_URL": given}).stack.api_url == kept


@pytest.mark.parametrize(
    "url",
    [
        "hush",
        "ftp://hush",
        "https://",
        "https://hush:hush",
        "https://me:hush@example.com",
        "https://me:hu/sh@example.com",
        "https://example.com?hush",
        "https://example.com/#hush",
        "https://exam\nple.com",
        "https://[hush",
        "http://example.com",
        "http://10.0.0.1",
        "http://localhost.example.com",
    ],
)
def test_unsafe_api_urls_are_refused_unquoted(here: Path, url: str) -> None:
    message = refusal(here, {"STACK_API_URL": url})
    assert message.startswith("stack.api_url (from the variable STACK_API_URL): should ")


def test_plain_http_is_taken_when_allowed(here: Path) -> None:
    stack = {"api_url": "http://stack.internal:8102", "allow_insecure": True}
    assert load(here, stack=stack).stack.api_url == "http://stack.internal:8102"


# Secrets


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DATABASE_URL", "hush"),
        ("DATABASE_URL", "postgresql+psycopg://me:hush@db/app"),
        ("DATABASE_URL", "postgresql://me:hush@db/app?hush=hush"),
        ("DATABASE_URL", "postgresql://me:hush@db:hush/app"),
        ("DATABASE_URL", "postgresql://me:hu/sh@db/app"),
        ("DATABASE_URL", "postgresql://me:x@hush@db/app"),
        ("DATABASE_URL", "postgresql://me:x@db,hush@db/app"),
        ("DATABASE_URL", "host=db password='hush"),
        ("STACK_SECRET_SERVER_KEY", "hush\nhush"),
        ("STACK_SECRET_SERVER_KEY", "hüsh hush"),
        ("STACK_SECRET_SERVER_KEY", '"hush"'),
        ("STACK_SECRET_SERVER_KEY", "pck_hush"),
        ("STACK_PROJECT_ID", "ssk_hush"),
        ("DATABASE_URL", f"'{URL}'"),
        ("STACK_SECRET_SERVER_KEY", "hu sh"),
        ("USERS_SYNC_ONCE__PING_URL", "ftp://hush/hush"),
        ("USERS_SYNC_ONCE__PING_URL", "https://hush:hush"),
        ("USERS_SYNC_HTTP__PORT", KEY),
        ("USERS_SYNC_LOG__LEVEL", KEY),
        ("USERS_SYNC_STACK__INCLUDE_ANONYMOUS", KEY),
        ("USERS_SYNC_STACK__KEY", KEY),
    ],
)
def test_no_secret_in_any_error(here: Path, variable: str, value: str) -> None:
    with pytest.raises(Misconfigured) as caught:
        load(here, {"STACK_SECRET_SERVER_KEY": KEY, variable: value})
    assert "hush" not in repr(caught.value)
    assert variable in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_no_secret_in_repr_or_dump(here: Path) -> None:
    settings = load(here, {"STACK_SECRET_SERVER_KEY": KEY, "DATABASE_URL": URL})
    assert "hush" not in f"{settings} {settings!r} {settings.model_dump()}"
    assert "hush" not in settings.model_dump_json()


def test_secrets_are_listed_for_the_log(here: Path) -> None:
    settings = load(here, {"STACK_SECRET_SERVER_KEY": KEY, "DATABASE_URL": URL})
    assert list(settings.secrets()) == [KEY, URL, "hush hush"]
    ping = {"USERS_SYNC_ONCE__PING_URL": "https://monitor.example/hush"}
    assert list(load(here, ping).secrets()) == ["https://monitor.example/hush"]
    assert list(load(here, {"DATABASE_URL": "embedded"}).secrets()) == []


def test_stack_access_is_complete_or_refused(here: Path) -> None:
    environ = {"STACK_PROJECT_ID": "internal"}
    expected = r"stack\.project_id .* STACK_PROJECT_ID or HEXCLAVE_PROJECT_ID,.*config\.toml"
    with pytest.raises(Misconfigured, match=expected):
        load(here).require_stack()
    expected = r"secret_server_key .* STACK_SECRET_SERVER_KEY or HEXCLAVE_SECRET_SERVER_KEY,"
    with pytest.raises(Misconfigured, match=expected):
        load(here, environ).require_stack()
    access = load(here, environ | {"STACK_SECRET_SERVER_KEY": KEY}).require_stack()
    assert (access.api_url, access.project_id) == ("https://api.stack-auth.com", "internal")
    assert access.secret_server_key.get_secret_value() == KEY
    assert "hush" not in repr(access)


def test_database_is_set_or_refused(here: Path) -> None:
    with pytest.raises(Misconfigured, match=r"database\.url .* DATABASE_URL.*config\.toml"):
        load(here).require_database()


def test_settings_are_frozen() -> None:
    settings = Settings(
        stack=StackSettings(page_size=5),
        database=DatabaseSettings(schema="other"),
        log=LogSettings(format="json"),
    )
    assert settings.database.schema_name == "other"
    with pytest.raises(ValidationError):
        settings.stack.page_size = 6


# The example


def uncommented() -> dict[str, Any]:
    return tomllib.loads(re.sub(r"(?m)^#(?! )", "", EXAMPLE.read_text("utf-8")))


def test_page_size_of_earlier_versions_counts_as_the_default(here: Path) -> None:
    (here / "config.toml").write_text('[stack]\npage_size = "auto"\n')
    settings = load(here)
    assert settings.stack.page_size == 1_000
    assert list(settings.outdated) == [("stack.page_size", 1_000)]
    assert list(load(here, {"USERS_SYNC_STACK__PAGE_SIZE": "7"}).outdated) == []
    assert list(load(here, {"USERS_SYNC_STACK__PAGE_SIZE": "auto"}).outdated) != []


def test_example_changes_nothing(here: Path) -> None:
    (here / "config.toml").write_bytes(EXAMPLE.read_bytes())
    assert load(here) == Settings()


def test_example_can_be_uncommented_whole(here: Path) -> None:
    load(here, **uncommented()).require_stack()


def test_example_has_every_setting_with_its_default() -> None:
    defaults = Settings().model_dump(mode="json", by_alias=True)
    example = uncommented()
    placeholders = [
        ("stack", "project_id"),
        ("stack", "secret_server_key"),
        ("database", "url"),
        ("fleet", "url"),
        ("once", "ping_url"),
    ]
    for section, name in placeholders:
        assert defaults[section].pop(name) is None
        assert example[section].pop(name)
    assert example == defaults


def test_example_explains_every_setting_as_settings_do() -> None:
    explained = re.findall(r"(?m)^# (.+)\n#(\w+) = ", EXAMPLE.read_text("utf-8"))
    expected = [
        (field.description, field.alias or name)
        for _, section in Settings()
        for name, field in type(section).model_fields.items()
    ]
    assert explained == expected
