"""Asks the API about single users: the only way to prove that one is gone."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from worker.errors import Misconfigured, SourceUnavailable
from worker.model import Proof, Single
from worker.sync.fetcher import Fetcher


@dataclass(slots=True)
class Verdicts:
    """What the API said about the users that were asked about.

    `proofs` are of those who are gone, `found` the answers about those it knows. `trouble` is why
    not all questions were answered: then no user may be deleted.
    """

    asked: set[str] = field(default_factory=set)
    proofs: dict[str, Proof] = field(default_factory=dict)
    found: dict[str, Single] = field(default_factory=dict)
    trouble: SourceUnavailable | Misconfigured | None = None


def confirm(fetcher: Fetcher, ids: Sequence[str], *, hinted: bool = False) -> Verdicts:
    """Ask for each of these users with GET, a few at a time; hints do not queue behind suspects.

    Raises what awaiting an answer raises, but for the errors that become `trouble`.
    """
    verdicts = Verdicts(asked=set(ids))
    submit = fetcher.submit_hinted if hinted else fetcher.submit_user
    answers = [(user_id, submit(user_id)) for user_id in ids]
    try:
        for user_id, answer in answers:
            single = fetcher.await_answer(answer)
            if single.found is None:
                verdicts.proofs[user_id] = Proof(user_id, single.observed_at)
            else:
                verdicts.found[user_id] = single
    except (SourceUnavailable, Misconfigured) as error:
        verdicts.trouble = error
    finally:
        for _, answer in answers:
            answer.cancel()
    return verdicts
