"""A cluster whose nodes are killed, started again and joined: what the measurements of size and growth do to one.

A node that comes back, or that is new, is started as an operator would start it: without `--peers`, from what its
directory holds or what the cluster says. Each look at a node is a blocking connection of its own (`Caller`).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from bench.cluster import Caller, Cluster
from bench.processes import Server, free_ports, wait_until
from bench.results import BenchError
from kvstore.model import Member, NodeStatus

# Beyond every bound that is judged: what takes longer has failed.
COMES_BACK_S = 120.0
_CHECKOUT = Path(__file__).parent.parent


class Nodes(Cluster):
    """Always started here. Addresses are those for clients."""

    def __init__(self) -> None:
        super().__init__([])
        self._scratch = Path()
        self._members: dict[str, Member] = {}

    def start(self, scratch: Path) -> None:
        super().start(scratch)
        self._scratch = scratch
        self._members = {member.client_address: member for member in self.look(self.leader).members}

    @property
    def followers(self) -> list[str]:
        return [address for address in self._servers if address != self.leader]

    @property
    def names(self) -> dict[str, str]:
        """Of the members at the start and of who joined, by address."""
        return {address: member.name for address, member in self._members.items()}

    def pid(self, address: str) -> int:
        return self._servers[address].pid

    def all_pids(self) -> list[int]:
        return [server.pid for server in self._servers.values()]

    def log(self, address: str) -> Path:
        return self._scratch / f"{self._members[address].name}.log"

    def data(self, address: str) -> Path:
        return self._scratch / self._members[address].name

    def stop(self) -> None:
        """Kill them: nobody needs what millions of records would have them flush."""
        for server in self._servers.values():
            if server.ended() is None:
                os.kill(server.pid, signal.SIGKILL)
        super().stop()

    # --- what is done to nodes ----------------------------------------------------------------------------------------

    def kill(self, addresses: Iterable[str]) -> None:
        """SIGKILL to all of them, then wait until they are gone."""
        killed = [self._servers[address] for address in addresses]
        for server in killed:
            os.kill(server.pid, signal.SIGKILL)
        for server in killed:
            server.stop()

    def start_again(self, address: str) -> None:
        """Start a node that was killed. Returns at once."""
        member = self._members[address]
        self._run(member, "serve", "--listen", member.peer_address, "--client-listen", address)

    def join(self, name: str) -> str:
        """Start a new node with `kvstore join`, everything at its default. Returns its address at once."""
        peer, client = (f"127.0.0.1:{port}" for port in free_ports(2))
        self._members[client] = member = Member(name, peer, client, "", False)
        endpoints = ",".join(self.endpoints)
        self._run(member, "join", "--listen", peer, "--client-listen", client, "--endpoints", endpoints)
        return client

    def _run(self, member: Member, command: str, *where: str) -> None:
        data = str(self._scratch / member.name)
        line = [sys.executable, "-m", "kvstore.cli.main", command, "--name", member.name, "--data-dir", data, *where]
        # Its own checkout is where it runs, so that `-m` finds the product that is measured.
        self._servers[member.client_address] = Server(
            f"node {member.name}", [*line, "--with-parent"], self.log(member.client_address), directory=_CHECKOUT
        )

    # --- what nodes say -----------------------------------------------------------------------------------------------

    def look(self, address: str) -> NodeStatus:
        """What one node says of itself. Raises BenchError if it does not answer."""
        caller = Caller(address)
        try:
            caller.hello()
            return caller.status()
        finally:
            caller.close()

    def find_leader(self) -> str:
        """Wait for a leader, who is `leader` from then on. Its address."""
        self.leader = wait_until("a leader", self._find_leader, list(self._servers.values()), COMES_BACK_S)
        return self.leader

    def caught_up(self, address: str, index: int) -> int:
        """Wait until this node follows or is a living leader and has applied `index` and all that the leader has
        committed by the first such moment. Returns that commit index. Raises BenchError."""
        server = self._servers[address]
        known = 0

        def look() -> int | None:
            nonlocal known
            try:
                status = self.look(address)
                if not status.leader:
                    return None
                if not known:
                    leader = self.look(status.leader_client_address)
                    if leader.role == "leader" and leader.commit_index >= index:
                        known = leader.commit_index
            except BenchError:  # not listening yet, or a leader that has just gone
                return None
            return known if known and status.applied_index >= known else None

        return wait_until(f"{server.name} to catch up", look, [server], COMES_BACK_S)

    def committed(self) -> int:
        """The commit index, as the leader knows it."""
        return self.look(self.leader).commit_index

    def bring_back(self, addresses: list[str]) -> float:
        """Kill these nodes and start them again at once. The seconds from the start of the first process until each has
        caught up with a living leader, who is `leader` then."""
        index = self.committed()
        self.kill(addresses)
        began = time.monotonic()
        for address in addresses:
            self.start_again(address)
        for address in addresses:
            self.caught_up(address, index)
        took_s = time.monotonic() - began
        self.find_leader()
        return took_s
