"""What a leader does about the cluster itself: membership changes, and handing its leadership over.

One membership change at a time, and only once an entry of the leader's own term is committed (fault 7, and the bug in
single-server changes that Ongaro announced in 2015). The leader removes others, never itself: it hands over first.

A hand-over (thesis, 3.10) stops proposals, waits until the target holds the whole log, then tells it to start an
election; if nothing comes of it in time, this node leads on. The engine's own transfer is refused while one entry is in
flight, so never succeeds under load (fault 19).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

from kvstore.env import Log
from kvstore.errors import KvError, Refused, StartupError, Unavailable
from kvstore.model import Member
from kvstore.raft.fsm import EntryKind
from kvstore.raft.members import Configuration
from kvstore.raft.messages import Message, TimeoutNow
from kvstore.raft.wal import Wal

# A new voter that is far behind would hold up commits; this many entries are caught up with in under a second.
PROMOTE_BEHIND_MAX = 1000
# A target that has just installed a snapshot knows its leader by the next heartbeat only, and a connection may break;
# it is told again after about a heartbeat. Told twice, it takes the second for stale.
TELL_AGAIN_S = 0.1

Done = Callable[[KvError | None], None]


class Leader(Protocol):
    """What this needs of the node. `alive` are the members that it hears, itself among them."""

    @property
    def accepting(self) -> bool: ...
    @property
    def term(self) -> int: ...
    @property
    def committed(self) -> int: ...
    def match_index(self, peer: str) -> int: ...
    def version_of(self, name: str, node_id: str) -> int: ...
    def alive(self) -> set[str]: ...
    def propose_entry(self, entry: bytes, done: Callable[[Any, KvError | None], None]) -> None: ...


class _HandOver:
    __slots__ = ("deadline", "done", "next_tell", "sent", "target")

    def __init__(self, target: str, deadline: float, done: Done) -> None:
        self.target = target
        self.deadline = deadline
        self.done = done
        self.sent = False
        self.next_tell = -math.inf


class Changes:
    """`members` is the configuration in force; the node keeps it up to date."""

    def __init__(
        self,
        name: str,
        leader: Leader,
        wal: Wal,
        send: Callable[[str, Message], None],
        log: Log,
        hears_within_s: float = 1.0,
    ) -> None:
        """`hears_within_s`: a leader for so long has heard every member that is alive."""
        self._name = name
        self._leader = leader
        self._wal = wal
        self._send = send
        self._log = log
        self.members = Configuration()
        self._proposed = False  # a change was handed to the node and is not in the log yet
        self._hears_within_s = hears_within_s
        self._leads_since: float | None = None
        self._now = 0.0
        self._hand_over: _HandOver | None = None

    # --- membership ---------------------------------------------------------------------------------------------------

    def add_learner(self, member: Member, done: Done, version: int = 0) -> None:
        """One that said that it understands less than `version` is refused; it may not have been heard yet."""

        def change() -> Configuration:
            changed = self.members.add_learner(member)
            self._understands(changed, member.name, version)
            return changed

        self._change(change, done)

    def promote(self, name: str, done: Done, version: int = 0) -> None:
        """Make a learner that has caught up, and understands `version`, a voter. One that this leader does not hear, or
        that has acknowledged nothing yet, may be no node at all."""

        def change() -> Configuration:
            alive, held = self._leader.alive(), self._leader.match_index(name)
            changed = self.members.promote(name, alive)
            understands = self._understands(changed, name, version)
            if name not in alive or not held or not understands:
                raise Refused(
                    f"{self._name}, which leads, does not hear {name}: see that it runs, and that its address in "
                    "`kvstore member list` leads to it",
                    code="not_caught_up",
                )
            behind = self._leader.committed - held
            if behind > PROMOTE_BEHIND_MAX:
                raise Refused(f"{name} is {behind} entries behind; wait until it has caught up", code="not_caught_up")
            return changed

        self._change(change, done)

    def _understands(self, members: Configuration, name: str, version: int) -> bool:
        """False where it was not heard. Raises `StartupError(data_format_newer)`: it would stop at the next entry."""
        member = members.get(name)
        assert member is not None
        said = self._leader.version_of(name, member.node_id)
        if 0 < said < version:
            raise StartupError(
                f"{name} runs a program that knows versions up to {said}, and the cluster is at {version}: run a newer "
                "one there",
                code="data_format_newer",
            )
        return said >= version

    def remove(self, name: str, done: Done, force: bool = False) -> None:
        """`force` gives up the check that the rest has a quorum alive; not the rule that one changes at a time. That
        check comes first: a leader that could not be removed need not hand over for it."""

        def change() -> Configuration:
            changed = self.members.remove(name, self.members.voters if force else self._leader.alive())
            if name == self._name:
                raise Refused(
                    f"{name} leads the cluster: hand leadership over first (`kvstore leave` does both)",
                    code="cannot_remove_leader",
                )
            return changed

        self._change(change, done)

    def identify(self, seen: dict[str, Member]) -> bool:
        """Record what members said of themselves: node ids, so that a wiped node is known for what it is, and
        addresses, which may change when a node moves. False: not now, try again."""
        identified = self.members.identify(seen)
        if identified != self.members:
            if not self._leader.accepting or self._under_way():
                return False
            self._propose(identified, lambda _error: None)
        return True

    def _change(self, change: Callable[[], Configuration], done: Done) -> None:
        if not self._leader.accepting:
            done(Unavailable("this node does not lead now", code="not_leader"))
        elif self._under_way():
            done(Unavailable("another membership change is under way; try again", code="membership_busy"))
        else:
            try:
                changed = change()
            except (Refused, StartupError) as error:
                new = self._leads_since is None or self._now - self._leads_since < self._hears_within_s
                if error.code == "would_lose_quorum" and new:
                    why = f"{self._name} has just begun to lead, and has not heard from all members yet; try again"
                    done(Unavailable(why, code="membership_busy"))
                else:
                    done(error)
                return
            self._propose(changed, done)

    def _propose(self, changed: Configuration, done: Done) -> None:
        described = [f"{member.name}{'' if member.voter else ' (learner)'}" for member in changed.members]
        self._log.info("membership change", members=described)
        self._proposed = True

        def finished(_result: Any, error: KvError | None) -> None:
            self._proposed = False
            done(error)

        self._leader.propose_entry(changed.entry(), finished)

    def _under_way(self) -> bool:
        wal, committed = self._wal, self._leader.committed
        if self._proposed or wal.term_at(committed) != self._leader.term:
            return True
        return any(entry[0][0] == EntryKind.MEMBERS for entry in wal.entries[committed + 1 - wal.first_index :])

    # --- hand-over ----------------------------------------------------------------------------------------------------

    @property
    def handing_over(self) -> bool:
        return self._hand_over is not None

    @property
    def due(self) -> float | None:
        """When a hand-over that is under way is given up, or its target told again."""
        hand_over = self._hand_over
        if hand_over is None:
            return None
        return min(hand_over.deadline, hand_over.next_tell) if hand_over.sent else hand_over.deadline

    def transfer(self, name: str, deadline: float, done: Done) -> None:
        """Hand leadership to `name`, or to the voter that holds most where `name` is empty. A name that cannot lead is
        `Refused`: `member_unknown`, `not_voter`."""
        if not self._leader.accepting:
            done(Unavailable("this node does not lead now", code="not_leader"))
            return
        try:
            if name:
                self.members.check_voter(name)
        except Refused as error:
            done(error)
            return
        candidates = (self.members.voters & self._leader.alive()) - {self._name}
        target = name or max(sorted(candidates), key=self._leader.match_index, default="")
        if target not in candidates:
            what = f"{name} is no other voter that can be reached" if name else "no other voter can be reached"
            done(Unavailable(f"{what}; leadership stays here", code="transfer_failed"))
            return
        self._hand_over = _HandOver(target, deadline, done)

    def step(self, now: float) -> None:
        """Once a turn of a leader."""
        self._now = now
        if self._leads_since is None:
            self._leads_since = now
        hand_over = self._hand_over
        if hand_over is None:
            return
        if now > hand_over.deadline:
            self._hand_over = None
            why = f"{hand_over.target} did not take over in time; leadership stays here"
            hand_over.done(Unavailable(why, code="transfer_failed"))
        elif now >= hand_over.next_tell and self._leader.match_index(hand_over.target) == self._wal.last_index:
            hand_over.sent, hand_over.next_tell = True, now + TELL_AGAIN_S
            self._send(hand_over.target, TimeoutNow(self._leader.term))

    def leadership_lost(self) -> None:
        """This node leads no more. If it had told the target to take over, that is how a hand-over ends well."""
        self._leads_since = None
        hand_over, self._hand_over = self._hand_over, None
        if hand_over is not None:
            why = f"leadership was lost before {hand_over.target} held everything"
            hand_over.done(None if hand_over.sent else Unavailable(why, code="transfer_failed"))
