"""Faults are counted, and what was tried is told."""

import pytest

from tests.faults.tally import table


def test_table_adds_up_what_was_tried() -> None:
    reports = [report("a", 2), report("b", 1), report("a", 40)]
    assert list(table(reports))[2:] == ["| a | 42 | it | `t.py` |", "| b | 1 | it | `t.py` |"]


def test_table_of_nothing_is_empty() -> None:
    assert list(table([])) == []


def report(what: str, times: int) -> pytest.TestReport:
    told = ("fault", (what, "it", "t.py", times))
    return pytest.TestReport("", ("", 0, ""), {}, "passed", None, "call", user_properties=[told])
