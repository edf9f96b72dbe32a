"""One line of the check."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "note", "warn", "FAIL"]

# A database with hundreds of foreign keys must not bury what else there is to say.
MOST_ALIKE = 10


@dataclass(frozen=True, slots=True)
class Finding:
    """Something looked at; `exit_code` belongs to a FAIL.

    A note is neither right nor wrong, but worth knowing.
    """

    verdict: Verdict
    subject: str
    text: str
    exit_code: int = 0


def alike(verdict: Verdict, subject: str, texts: Sequence[str]) -> list[Finding]:
    """Make a finding of each text, and of those beyond MOST_ALIKE one that counts them."""
    rest = len(texts) - MOST_ALIKE
    shown = [*texts[:MOST_ALIKE], f"… and {rest} more"] if rest > 0 else texts
    return [Finding(verdict, subject, text) for text in shown]
