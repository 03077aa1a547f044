"""Ways to the nodes of a cluster, and which of them leads.

Rules
- Links open when somebody needs a way: to the leader where it is known, else to every node that is known, at once, so
  that a failover finds its connections made.
- Who leads is told by Welcome, `not_leader` answers and node statuses. A node's own word, or a status of a newer term,
  beats hearsay; hearsay never replaces a leader whose link works.
- Who finds no way parks here. Parked calls send nothing: small status probes look for the leader instead, so an outage
  costs the cluster no copies of requests. A link becoming ready wakes them all.
- A link that fails is not tried again before its backoff has passed. A node of another cluster, or of another protocol
  version, is never used; if all are so, parked calls hear it at once.
- The first cluster that welcomes us is the only one from then on: a port that another cluster took over is refused.
- Nodes of the cluster's configuration are learned, and forgotten when they leave it; the given endpoints always stay.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

from kvstore import codec
from kvstore.client.connection import ENDPOINTS_MAX, Channel, Connector, split_address
from kvstore.codec import Failure, Hello, ServerFrame, StatusAnswer, StatusRequest, Welcome
from kvstore.errors import KvError, error_for
from kvstore.model import NodeStatus

# A fresh connection owes its Welcome at once; a process that accepts and says nothing is stopped or no node.
HANDSHAKE_TIMEOUT_S = 1.0
# Reconnecting: the first wait is short because restarts and elections are; the last keeps a dead node's cost near nil.
LINK_BACKOFF_MIN_S, LINK_BACKOFF_MAX_S = 0.02, 0.5
# Looking for a leader: an election takes half a second and more, so ten looks a second find it soon enough, and a
# thousand clients doing so cost a node a few per cent of a core.
PROBE_MIN_S, PROBE_MAX_S = 0.02, 0.1

# A handshake that ended so will end so again.
HOPELESS_CODES = frozenset({"wrong_cluster", "version_mismatch"})


class Route(IntEnum):
    """Which node a request wants."""

    LEADER = 0  # nobody else can do it
    ANY = 1  # any node can; the leader is one hop shorter
    REPLICA = 2  # any node can, and the leader has better things to do


class Reason(NamedTuple):
    """Why a request is not done yet. `code` is that of a definite no, or empty where there was none."""

    code: str
    text: str


class Parked(Protocol):
    """A call without a way to send."""

    def wake(self) -> None:
        """There may be a way now."""

    def refuse(self, error: KvError) -> None:
        """There is none and there will be none."""


class LinkState(IntEnum):
    IDLE = 0
    OPENING = 1
    READY = 2


class Link:
    """The way to one address: closed, opening, or ready. Sink of its own handshake and of its probes."""

    __slots__ = (
        "_failures",
        "_handshake_timer",
        "_pool",
        "address",
        "channel",
        "deposed",
        "given",
        "last_error",
        "leads_nobody",
        "name",
        "probing",
        "refusal",
        "retry_at",
        "state",
    )

    def __init__(self, pool: Pool, address: str, given: bool) -> None:
        self._pool = pool
        self._failures = 0
        self._handshake_timer: asyncio.TimerHandle | None = None
        self.address = address
        self.given = given
        self.name = ""
        self.state = LinkState.IDLE
        self.channel: Channel | None = None
        self.deposed = False
        self.retry_at = 0.0
        self.refusal: KvError | None = None
        self.last_error = ""
        self.leads_nobody: Reason | None = None
        """Why its node, by its newest status, can send no write anywhere; None if it can, or has told nothing yet."""
        self.probing = False

    def open(self, now: float) -> bool:
        """Begin to open it if that is allowed now. True if it is opening or ready afterwards."""
        if self.state is not LinkState.IDLE:
            return True
        if self.refusal is not None or now < self.retry_at:
            return False
        self.state = LinkState.OPENING
        self._pool.connector.connect(self.address, self)
        return True

    def close(self, reason: str) -> None:
        if self.channel is not None:
            self.channel.close(reason)

    # --- connection events --------------------------------------------------------------------------------------------

    def on_open(self, channel: Channel) -> None:
        self.channel = channel
        if self._pool.closed:
            channel.close("closed by this client")
            return
        self._handshake_timer = self._pool.loop.call_later(HANDSHAKE_TIMEOUT_S, self._handshake_late)
        channel.send(Hello(self._pool.next_id(), codec.PROTOCOL_VERSION, self._pool.cluster_id), self)

    def on_failed(self, reason: str) -> None:
        self._end(reason)

    def on_silent(self) -> None:
        self._pool.link_silent(self)

    def on_closed(self, reason: str, code: str) -> None:
        if self.state is LinkState.OPENING:
            self._refused(code, reason)
        self._end(f"connection to {self.address} ended: {reason}")

    def _end(self, reason: str) -> None:
        if self._handshake_timer is not None:
            self._handshake_timer.cancel()
            self._handshake_timer = None
        self.channel = None
        self.leads_nobody = None
        self.probing = False
        self.state = LinkState.IDLE
        if self.refusal is None:
            self.last_error = reason
        # Full jitter over the upper half: clients that lost one node together come back spread out, yet not at once.
        ceiling_s = min(LINK_BACKOFF_MAX_S, LINK_BACKOFF_MIN_S * 2**self._failures)
        self.retry_at = self._pool.loop.time() + ceiling_s * (0.5 + 0.5 * self._pool.chance.random())
        self._failures = min(self._failures + 1, 16)  # 2**16 times the first wait is beyond the last; no need to grow
        self._pool.link_ended(self)

    def _handshake_late(self) -> None:
        self._handshake_timer = None
        self.close("it accepted the connection and did not answer")

    # --- answers to Hello and StatusRequest ---------------------------------------------------------------------------

    def on_frame(self, frame: ServerFrame) -> None:
        if type(frame) is Welcome:
            self._welcomed(frame)
        elif type(frame) is StatusAnswer:
            self.probing = False
            self._failures = 0
            self._pool.learn(self, frame.status)
        elif type(frame) is Failure:
            self.probing = False
            if self.state is LinkState.OPENING:
                self._refused(frame.code, frame.message)
                self.close(f"{frame.message} [{frame.code}]")
        else:
            self.close(f"it answered {type(frame).__name__} to what was not that question")

    def on_lost(self) -> None:
        """The end of the connection is told by `on_closed`; nothing more to do."""

    def _refused(self, code: str, message: str) -> None:
        """The node ended the handshake. Some reasons will never go away."""
        if code in HOPELESS_CODES:
            self.refusal = error_for(code, f"{self.address}: {message}")
            self.last_error = str(self.refusal)

    def _welcomed(self, welcome: Welcome) -> None:
        if self._handshake_timer is not None:
            self._handshake_timer.cancel()
            self._handshake_timer = None
        wanted = self._pool.cluster_id
        if wanted and welcome.cluster_id != wanted:
            self._refused("wrong_cluster", f"this is cluster {welcome.cluster_id}, not {wanted}")
            self.close("it is of another cluster")
            return
        self.name = welcome.name
        self.state = LinkState.READY
        self._pool.link_ready(self, welcome)


class Pool:
    """All links of one client."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connector: Connector,
        endpoints: Sequence[str],
        cluster_id: str,
        chance: random.Random,
        next_id: Callable[[], int],
    ) -> None:
        self.loop = loop
        self.connector = connector
        self.cluster_id = cluster_id
        self.chance = chance
        self.next_id = next_id
        self.closed = False
        self._links = {address: Link(self, address, True) for address in endpoints}
        self._leader: Link | None = None
        self._leader_term = 0
        self._replica: Link | None = None
        self._turn = chance.randrange(1 << 16)
        self._parked: dict[Parked, None] = {}
        self._probe_timer: asyncio.TimerHandle | None = None
        self._probe_wait_s = PROBE_MIN_S

    # --- for calls ----------------------------------------------------------------------------------------------------

    def choose(self, route: Route) -> Link | None:
        """A ready link for a request, or None: then begin to look for one, and park."""
        leader = self._leader
        if route is not Route.REPLICA and leader is not None and leader.state is LinkState.READY:
            return leader
        if route is Route.REPLICA:
            if self._replica is None or self._replica.state is not LinkState.READY:
                self._replica = self._any_ready()
            if self._replica is not None:
                return self._replica
        elif route is Route.ANY:
            link = self._any_ready()
            if link is not None:
                self.seek()
                return link
        self.seek()
        return None

    def at(self, address: str) -> Link | None:
        """The ready link to one address, or None: then begin to open it, and park."""
        link = self._links.get(address)
        if link is None:
            split_address(address)
            link = self._links[address] = Link(self, address, False)
        if link.state is LinkState.READY:
            return link
        link.open(self.loop.time())
        return None

    def park(self, call: Parked) -> None:
        self._parked[call] = None
        if self._probe_timer is None:
            self._probe_wait_s = PROBE_MIN_S
            self._arm_probe()
        self._refuse_if_hopeless()

    def unpark(self, call: Parked) -> None:
        self._parked.pop(call, None)

    def failed(self, link: Link | None, code: str, hint: str) -> None:
        """A node answered that it could not take a request."""
        if link is None:
            return
        if link is self._replica:
            self._replica = None  # another may be fresher, or less busy
        if link is self._leader and code in ("not_leader", "no_leader", "shutting_down", "storage_failed"):
            self._leader = None
            self._probe_all()  # what a hint says may be wrong, or missing
        if hint and hint != link.address:
            self._hearsay(hint)

    @property
    def leader_ready(self) -> bool:
        return self._leader is not None and self._leader.state is LinkState.READY

    @property
    def last_error(self) -> str:
        """Why the links that are not ready are not, for a message to people."""
        return "; ".join(link.last_error for link in self._links.values() if link.last_error)

    def why_parked(self, route: Route) -> Reason:
        """Why there is no way to send. Parked calls send nothing, so no answer to them could tell: those who wait for
        a leader hear what the nodes said of themselves. A failed disk goes first, because somebody can mend it."""
        if route is not Route.LEADER or self._leader is not None:
            return Reason("", self.last_error)
        told = [link.leads_nobody for link in self._links.values() if link.leads_nobody is not None]
        told.sort(key=lambda reason: reason.code != "storage_failed")
        code = told[0].code if told else ""
        return Reason(code, "; ".join(filter(None, (*(reason.text for reason in told), self.last_error))))

    def seek(self) -> None:
        """Begin to open what is needed to reach the leader, or anybody."""
        now = self.loop.time()
        if self._leader is not None and self._leader.open(now):
            return
        for link in tuple(self._links.values()):
            link.open(now)

    async def close(self) -> None:
        self.closed = True
        if self._probe_timer is not None:
            self._probe_timer.cancel()
            self._probe_timer = None
        self._parked.clear()
        await self.connector.close()

    # --- for links ----------------------------------------------------------------------------------------------------

    def link_ready(self, link: Link, welcome: Welcome) -> None:
        if not self.cluster_id:
            self.cluster_id = welcome.cluster_id
        if welcome.leader_client_address:
            self._hearsay(welcome.leader_client_address)
        self._probe(link)  # learns the other members, and the leader with its term
        self._wake()

    def link_ended(self, link: Link) -> None:
        if link is self._leader:
            self._leader = None
        if link is self._replica:
            self._replica = None
        if self.closed:
            return
        self._probe_all()  # it may have left the cluster, and others have come
        if self._parked:
            self.seek()
            self._refuse_if_hopeless()

    def link_silent(self, link: Link) -> None:
        """A node owes answers. If it led, the others may follow another by now: they are asked, also those to whom
        nobody needed a way so far."""
        self._leave_if_silent(link)
        now = self.loop.time()
        for other in tuple(self._links.values()):
            other.open(now)
        self._probe_all()

    def learn(self, link: Link, status: NodeStatus) -> None:
        link.leads_nobody = _why_no_leader(link.address, status)
        members = {member.client_address for member in status.members if member.client_address}
        for address in members:
            if address not in self._links and len(self._links) < ENDPOINTS_MAX:
                self._links[address] = Link(self, address, False)
        if status.term < self._leader_term:
            return  # an old configuration: a node whose disk was lost may know only whom the cluster began with
        if members:
            for address, other in tuple(self._links.items()):
                if not other.given and address not in members and other.state is LinkState.IDLE:
                    del self._links[address]
        leads = link if status.role == "leader" else self._links.get(status.leader_client_address)
        if leads is None or leads is self._leader:
            self._leader_term = status.term if leads is not None else self._leader_term
            return
        if status.term > self._leader_term or leads is link or not self._leader_works():
            deposed = self._leader if status.term > self._leader_term else None
            self._leader_term = status.term
            self._follow(leads)
            if deposed is not None and deposed is not self._leader:
                deposed.deposed = True
                self._leave_if_silent(deposed)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _leader_works(self) -> bool:
        return self._leader is not None and self._leader.state is not LinkState.IDLE

    def _leave_if_silent(self, link: Link) -> None:
        """What a deposed leader owes is asked of the new one, rather than waited for until it is given up."""
        if link.deposed and link.channel is not None and link.channel.silent:
            link.close("it is silent, and another leads")

    def _hearsay(self, address: str) -> None:
        """Somebody says that `address` leads."""
        if self._leader_works():
            return
        link = self._links.get(address)
        if link is None:
            if len(self._links) >= ENDPOINTS_MAX:
                return
            link = self._links[address] = Link(self, address, False)
        self._follow(link)

    def _follow(self, link: Link) -> None:
        # A follower names a dead leader until its election timeout: a link in backoff is not followed until it may
        # be tried again.
        if not link.open(self.loop.time()):
            return
        self._leader = link
        link.deposed = False
        if link.state is LinkState.READY:
            self._wake()

    def _any_ready(self) -> Link | None:
        ready = [link for link in self._links.values() if link.state is LinkState.READY]
        if not ready:
            return None
        self._turn += 1
        return ready[self._turn % len(ready)]

    def _wake(self) -> None:
        if not self._parked:
            return
        parked, self._parked = self._parked, {}
        for call in parked:
            call.wake()

    def _refuse_if_hopeless(self) -> None:
        refusals = [link.refusal for link in self._links.values()]
        if not self._parked or not all(refusals):
            return
        error = next(refusal for refusal in refusals if refusal is not None)
        parked, self._parked = self._parked, {}
        for call in parked:
            call.refuse(error)

    def _arm_probe(self) -> None:
        wait_s = self._probe_wait_s * (0.5 + 0.5 * self.chance.random())
        self._probe_timer = self.loop.call_later(wait_s, self._look)

    def _look(self) -> None:
        """While calls are parked: ask every node that can be reached who leads, and try again those that could not."""
        self._probe_timer = None
        if not self._parked or self.closed:
            return
        self._probe_wait_s = min(PROBE_MAX_S, self._probe_wait_s * 1.5)
        now = self.loop.time()
        for link in tuple(self._links.values()):
            link.open(now)
        self._probe_all()
        self._arm_probe()

    def _probe_all(self) -> None:
        for link in tuple(self._links.values()):
            if link.state is LinkState.READY:
                self._probe(link)

    def _probe(self, link: Link) -> None:
        if link.channel is not None and not link.probing:
            link.probing = True
            link.channel.send(StatusRequest(self.next_id()), link)


def _why_no_leader(address: str, status: NodeStatus) -> Reason | None:
    if status.storage_error:
        return Reason("storage_failed", f"{address}: {status.storage_error} [storage_failed]")
    if status.role != "leader" and not status.leader:
        return Reason("no_leader", f"{address}: {status.name} knows no leader; see that a majority runs [no_leader]")
    return None
