"""What the leader does unasked: end sessions and leases whose time has passed, compact history, and raise the cluster's
version once all members understand a newer one.

All are log entries like any other, so every node does the same at the same place; here stands only when to propose
them. Looked at once a second, on the leader only, and at most one of each is under way; ten times a second while the
cluster is not at this node's version, so that a new cluster soon is.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Raw

from kvstore import codec, model, versions
from kvstore.env import Environment, Timer
from kvstore.server.batcher import Batcher
from kvstore.server.log_clock import LogClock
from kvstore.server.ports import Log, Machine, Raft

# A session or lease may outlive its time by this much; looking costs microseconds.
_INTERVAL_S = 1.0
_UPGRADE_INTERVAL_S = 0.1

_RAISING = "raising the cluster's version"
_EXPIRE_SESSIONS = Raw(codec.encode_request(model.ExpireSessions()))
_EXPIRE_LEASES = Raw(codec.encode_request(model.ExpireLeases()))


class Chores:
    def __init__(
        self,
        env: Environment,
        raft: Raft,
        machine: Callable[[], Machine],
        log_clock: LogClock,
        batcher: Batcher,
        log: Log,
    ) -> None:
        self._env = env
        self._raft = raft
        self._machine = machine
        self._log_clock = log_clock
        self._batcher = batcher
        self._log = log
        self._timer: Timer | None = None
        self._under_way: set[str] = set()
        self._looked_at = 0.0

    def start(self) -> None:
        self._timer = self._env.scheduler.call_later(_UPGRADE_INTERVAL_S, self._look)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def raises_version(self) -> bool:
        """True while an own entry that raises the cluster's version is not applied yet."""
        return _RAISING in self._under_way

    def _look(self) -> None:
        is_newer = self._machine().version < versions.VERSION
        self._timer = self._env.scheduler.call_later(_UPGRADE_INTERVAL_S if is_newer else _INTERVAL_S, self._look)
        if is_newer and self._raft.accepting:
            common = min(self._raft.status().common_version, versions.VERSION)
            if common > self._machine().version:
                self._begin(_RAISING, Raw(codec.encode_request(model.RaiseVersion(common))))
        now = self._env.clock.monotonic()
        if now - self._looked_at < _INTERVAL_S * 0.9:
            return
        self._looked_at = now
        if self._raft.accepting:
            self._expire_leases()
            now_ms = self._log_clock.now_ms()
            if self._machine().stamp_due(now_ms):
                self._begin("saying what time it is", _EXPIRE_LEASES)  # it ends none that is not due
            if self._machine().expiry_due(now_ms):
                self._begin("expiring sessions", _EXPIRE_SESSIONS)
            revision = self._machine().compaction_due(now_ms)
            if revision is not None:
                self._begin("compacting history", Raw(codec.encode_request(model.Compact(revision))))

    def _expire_leases(self) -> None:
        """One entry ends so many; where more are due, the next follows at once."""
        if self._raft.accepting and self._machine().lease_expiry_due(self._log_clock.now_ms()):
            self._begin("expiring leases", _EXPIRE_LEASES, self._expire_leases)

    def _begin(self, chore: str, request: Raw, again: Callable[[], None] | None = None) -> None:
        if chore in self._under_way:
            return
        self._under_way.add(chore)

        def done(answer: codec.ServerFrame) -> None:
            self._under_way.discard(chore)
            self._note(chore, answer)
            if again is not None and isinstance(answer, codec.Answer) and self._timer is not None:
                self._env.scheduler.call_soon(again)

        self._batcher.submit(codec.Write(0, 0, 0, 0, request), done)

    def _note(self, chore: str, answer: codec.ServerFrame) -> None:
        """It is tried again a second later if still due, so a failure is only worth a line."""
        if isinstance(answer, codec.Failure):
            self._log.warning("chore_failed", chore=chore, code=answer.code, message=answer.message)
        elif isinstance(answer, codec.Answer):
            result = codec.decode_result(answer.result)
            if isinstance(result, model.ErrorResult):
                self._log.error("chore_refused", chore=chore, code=result.code, message=result.message)
