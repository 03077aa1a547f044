"""The `kvstore` command with a fault that must be found: it forgets what it has answered, so that a request which is
sent again is done again."""

from __future__ import annotations

import sys

from kvstore.cli.main import run
from kvstore.codec import BatchItem
from kvstore.state.sessions import Session, Sessions

_admit = Sessions.admit


def _admit_anew(self: Sessions, item: BatchItem) -> Session | bytes:
    session = self.by_id.get(item.session)
    if session is not None:
        session.answers.pop(item.seq, None)
    return _admit(self, item)


if __name__ == "__main__":
    Sessions.admit = _admit_anew  # type: ignore[method-assign]
    sys.exit(run())
