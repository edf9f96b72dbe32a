"""What the server says of an error, without what may be data of users."""

import re

import psycopg

# Of errors in a function, such as a trigger's, Postgres' own words in these cases name objects
# alone: a lacking right, a missing table, function or schema. All others may quote a row.
_NAME_OBJECTS = {"42501", "42P01", "42883", "3F000"}
_RAISE = "exec_stmt_raise"

# These say in their detail what is wrong with a publication or a column.
_DETAILED = {"42P10", "0A000", "55000"}

_FUNCTION = re.compile(
    r"^(?:PL/\w+|SQL) function (.+?)(?= line \d+| during | statement \d+|$)", re.MULTILINE
)


def server_words(error: psycopg.Error) -> str:
    """Give the server's words and SQLSTATE in one line, and the function that failed."""
    diag = error.diag
    words = type(error).__name__
    if not diag.context:
        words = diag.message_primary or words
        if diag.message_detail and error.sqlstate in _DETAILED:
            words = f"{words}: {diag.message_detail.rstrip('.')}"
    elif error.sqlstate in _NAME_OBJECTS and diag.source_function not in {None, _RAISE}:
        words = diag.message_primary or words
    elif diag.constraint_name:
        words = f"{words} {diag.constraint_name}"
    inside = _FUNCTION.search(diag.context or "")
    where = f" in the function {inside[1]}" if inside else ""
    return f"{' '.join(words.split())} ({error.sqlstate}){where}"
