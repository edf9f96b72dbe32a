"""No value and no name gets into SQL as text: it is constant, or composed by psycopg."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import worker

ROOT = Path(worker.__file__).parent
RUNS_SQL = {"execute", "executemany", "copy", "stream"}

# What looks like text put together, and why it is harmless. Whoever adds a line says so here.
HARMLESS = {
    ("cli/check/table.py", "TREE"): "a query of ours",
    ("cli/status.py", "', '.join(COUNTS)"): "the names of our own counts",
    ("cli/status.py", "', '.join(_FACTS)"): "the names of our own columns",
    ("fleet/control.py", "_PROJECT"): "a query of ours",
    ("store/lease.py", "IDENTITY"): "a query of ours",
    ("store/sweeps.py", "_INSERT"): "a query of ours",
    ("store/sweeps.py", "form.format(name)"): "the names of our own counts",
    ("store/migrate.py", "text.encode()"): "a file of ours or of the engine's, or composed",
}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text("utf-8"))


def is_sql(call: ast.Call) -> bool:
    """Whether the first argument of a call is SQL: `….execute(…)`, `sql.SQL(…)`."""
    function = call.func
    return isinstance(function, ast.Attribute) and (
        function.attr in RUNS_SQL or function.attr == "SQL"
    )


def is_composition(node: ast.expr) -> bool:
    """Whether this is psycopg's own composing: `sql.SQL(…)`, and methods of it."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (node.func.attr == "SQL" or is_composition(node.func.value))
    )


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def put_together(node: ast.AST) -> Iterator[ast.expr]:
    """Find where text is put together in an expression."""
    for part in ast.walk(node):
        match part:
            case ast.JoinedStr(values=values):
                yield from (each.value for each in values if isinstance(each, ast.FormattedValue))
            case ast.BinOp(op=ast.Add() | ast.Mod()) if is_text(part.left) or is_text(part.right):
                yield part
            case ast.Call(func=ast.Attribute(value=value, attr="format")):
                if not is_composition(value):
                    yield part
            case ast.Call(func=ast.Attribute(value=ast.Constant(), attr="join" | "replace")):
                yield part
            case ast.Call(func=ast.Attribute(attr="encode")):
                yield part


def suspicious(module: ast.Module) -> Iterator[str]:
    """Find text put together in SQL, also where a name of the module stands for it."""
    named: dict[str, list[ast.expr]] = {}
    for node in ast.walk(module):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                named.setdefault(name, []).append(value)
            case ast.AugAssign(target=ast.Name(id=name), value=value):
                named.setdefault(name, []).append(value)
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and is_sql(node) and node.args:
            given = node.args[0]
            behind = named.get(given.id, []) if isinstance(given, ast.Name) else []
            for each in [given, *behind]:
                yield from map(ast.unparse, put_together(each))


def test_sql_is_never_put_together_as_text() -> None:
    found = {(name, text) for name, module in sources() for text in suspicious(module)}
    assert found - HARMLESS.keys() == set()
    assert HARMLESS.keys() - found == set(), "no longer there"


@pytest.mark.parametrize(
    "source",
    [
        "conn.execute(f'select * from {table}')",
        "conn.execute('select * from ' + table)",
        "conn.execute('select * from %s' % table)",
        "conn.execute('select * from {}'.format(table))",
        "conn.execute(text.encode())",
        "sql.SQL('where {}'.format(name))",
        "sql.SQL(' and '.join(names))",
        "query = 'select * from ' + table\nconn.execute(query)",
        "query = 'select 1'\nquery += f' from {table}'\nconn.execute(query)",
        "cursor.copy(f'copy {table} from stdin')",
    ],
)
def test_text_put_together_would_be_found(source: str) -> None:
    assert list(suspicious(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "conn.execute(_QUERY, {'id': user_id})",
        "conn.execute(sql.SQL('select * from {}').format(sql.Identifier(schema, 'users_sync')))",
        "conn.execute(sql.SQL(' or ').join(map(sql.SQL, parts)))",
        "log.info(f'{count} rows')",
    ],
)
def test_constants_and_compositions_are_fine(source: str) -> None:
    assert list(suspicious(ast.parse(source))) == []
