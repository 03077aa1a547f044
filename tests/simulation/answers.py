"""Exactly once: what each request of each session was answered with, over the whole run.

The committed entries with their results are looked at once, in order, as they are first applied anywhere (that all
replicas give the same results is checked elsewhere). A request, named by (session, seq), may stand in the log as often
as a client sent it. It executes at most once: after that it is answered with the very same bytes, or, once the client
acknowledged it, with `stale_sequence`, or, once the session is gone, with `session_expired`; and a session that is
gone stays so. An answer that executes twice would differ: a mutation's result holds the revision that it made.
"""

from __future__ import annotations

from kvstore import codec
from kvstore.model import CloseSession, ErrorResult, KeepSession
from tests.simulation.ledger import Broken, shortened

_ERROR_TAG = 127
# Their seq means nothing.
_SESSION_REQUESTS = frozenset({KeepSession, CloseSession})


class Answers:
    def __init__(self) -> None:
        self._executed: dict[tuple[int, int], tuple[int, bytes]] = {}  # (session, seq) -> (index, answer)
        self._acked_below: dict[int, int] = {}
        self._gone: dict[int, int] = {}  # session -> index of the first answer that said so

    def applied(self, index: int, payload: bytes, answers: list[bytes]) -> None:
        """A DATA entry (without the byte of its kind) was applied for the first time. O(requests)."""
        items = codec.decode_batch(payload).items
        if len(items) != len(answers):
            raise Broken(
                "exactly once", f"entry {index} holds {len(items)} requests and got {len(answers)} answers", index
            )
        for item, answer in zip(items, answers, strict=True):
            if item.session:
                self._item(index, item, answer)

    def _item(self, index: int, item: codec.BatchItem, answer: bytes) -> None:
        session, seq = item.session, item.seq
        refusal = _refusal(answer) if answer[1] == _ERROR_TAG else ""
        if refusal == "session_expired":
            self._gone.setdefault(session, index)
            return
        if session in self._gone:
            message = f"session {session} was gone at entry {self._gone[session]}, and lives again at {index}"
            raise Broken("exactly once", message, self._gone[session], index)
        acked = self._acked_below.get(session, 1)
        if refusal == "overloaded":
            return  # not even looked at
        if item.acked_below > acked:
            self._acked_below[session] = acked = item.acked_below
        if type(item.request) in _SESSION_REQUESTS or seq < 1:
            return
        known = self._executed.get((session, seq))
        if refusal == "stale_sequence":
            if seq >= acked:
                raise Broken(
                    "exactly once", f"entry {index} refuses request {seq} of session {session} as stale", index
                )
        elif seq < acked:
            message = f"entry {index} answers request {seq} of session {session}, acknowledged below {acked}, anew"
            raise Broken("exactly once", f"{message}: {shortened(answer)}", index)
        elif known is not None:
            if known[1] != answer:
                message = (
                    f"request {seq} of session {session} was answered {shortened(known[1])} by entry {known[0]} and "
                    f"{shortened(answer)} by entry {index}"
                )
                raise Broken("exactly once", message, known[0], index)
        elif refusal != "session_full":
            self._executed[session, seq] = (index, answer)


def _refusal(answer: bytes) -> str:
    result = codec.decode_result(answer)
    assert isinstance(result, ErrorResult)
    return result.code
