"""Nodes as real processes that reach each other, and are reached by clients, through the proxy alone.

Each node listens on ports of its own and advertises two doors of the proxy instead. The harness's own looks at a node
(`status`, `leader`, `converged`) go straight to it: they see what a node says even where nobody else can reach it.

The disk that fills is `fill_disk`: a limit on the size of the files that the process writes (RLIMIT_FSIZE, which needs
no privilege), so every write to the log, the store and the log file fails as the kernel makes it fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import resource
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tests.chaos.network import Network
from tests.chaos.proxy import Door
from tests.cluster.harness import COMMAND, READY_S, STOP_S, ClusterProcesses, Main, NodeProcess, free_ports, until

# Where a file may not grow any more: all but empty files are past it.
_FULL_BYTES = 1


class ProxiedCluster(ClusterProcesses):
    """See the module. `endpoints` and `client` lead through the proxy."""

    def __init__(
        self,
        path: Path,
        nodes: int = 3,
        *,
        seed: int = 0,
        main: Main = COMMAND,
        arguments: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(path, nodes, main=main, arguments=arguments, environment=environment)
        self.network = Network(seed)
        self._doors: dict[str, tuple[int, int]] = {}
        self._fresh = itertools.count(1)
        for name in self.nodes:
            self._plan_doors(name)

    async def __aenter__(self) -> ProxiedCluster:
        await self.network.__aenter__()
        try:
            for name in self.nodes:
                await self._open_doors(name)
            await super().__aenter__()
        except BaseException:
            await self.network.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await super().__aexit__(kind, error, trace)
        await self.network.__aexit__(kind, error, trace)

    # --- addresses ----------------------------------------------------------------------------------------------------

    @property
    def endpoints(self) -> str:
        return ",".join(self._door_addresses(name)[1] for name in self.nodes)

    @property
    def peers(self) -> str:
        return ",".join(f"{name}={'/'.join(self._door_addresses(name))}" for name in self._initial)

    def serve_arguments(self, name: str) -> list[str]:
        return [*super().serve_arguments(name), *self._where(name)]

    def _where(self, name: str) -> list[str]:
        """Where a node listens, and what it says of that. (The last of options that stand there twice counts.)"""
        node = self.nodes[name]
        peer, client = self._door_addresses(name)
        return [
            "--listen", node.peer_address, "--client-listen", node.client_address,
            "--advertise", peer, "--client-advertise", client, "--with-parent",
        ]  # fmt: skip

    def _door_addresses(self, name: str) -> tuple[str, str]:
        peer, client = self._doors[name]
        return f"127.0.0.1:{peer}", f"127.0.0.1:{client}"

    def _plan_doors(self, name: str) -> None:
        peer, client = free_ports(2)
        self._doors[name] = (peer, client)

    async def _open_doors(self, name: str) -> None:
        node = self.nodes[name]
        peer, client = self._doors[name]
        await self.network.open(Door(name, peer, port_of(node.peer_address), for_peers=True))
        await self.network.open(Door(name, client, port_of(node.client_address), for_peers=False))

    # --- members that come and go -------------------------------------------------------------------------------------

    async def join_through(self, name: str) -> NodeProcess:
        """Start a node with `kvstore join`: a new one, or one that comes back with an empty directory."""
        through = self.endpoints
        if name not in self.nodes:
            peer_port, client_port = free_ports(2)
            self.nodes[name] = NodeProcess(name, self.path, peer_port, client_port)
            self._plan_doors(name)
            await self._open_doors(name)
        node = self.nodes[name]
        arguments = [
            "join", "--name", name, "--data-dir", str(node.data_dir), "--endpoints", through, "--timeout", "10",
            *self._where(name),
        ]  # fmt: skip
        node.run(self._main, arguments, self._environment)
        return node

    def wipe(self, name: str) -> None:
        """The directory of a dead node is lost."""
        node = self.nodes[name]
        assert not node.running, f"{name} still runs"
        shutil.rmtree(node.data_dir)

    def forget(self, name: str) -> None:
        """A node that has left is none of ours any more. Its doors stay, and lead nowhere."""
        node = self.nodes[name]
        assert not node.running, f"{name} still runs"
        node.reap()
        del self.nodes[name]

    def fresh_name(self) -> str:
        """A name that no node has had."""
        return f"m{next(self._fresh)}"

    async def is_voter(self, name: str) -> bool:
        """As a majority's leader says."""
        for node in list(self.nodes.values()):
            status = await self.status(node.name) if node.running else None
            if status is not None and status.role == "leader":
                return any(member.name == name and member.voter for member in status.members)
        return False

    # --- without stopping the loop ------------------------------------------------------------------------------------

    async def ended(self, name: str, within_s: float = STOP_S) -> int:
        """Wait for a node's process to end; its exit code."""
        node = self.nodes[name]

        async def gone() -> bool:
            return not node.running

        await until(gone, within_s, f"{name} to end")
        code = node.reap()
        assert code is not None
        return code

    async def terminate(self, name: str, within_s: float = STOP_S) -> int:
        """SIGTERM, and wait; the exit code."""
        self.nodes[name].signal(signal.SIGTERM)
        return await self.ended(name, within_s)

    async def whole(self, within_s: float = READY_S) -> str:
        """Wait until every node runs, answers, and follows one leader, who has all of them as voters and has them all
        within reach; that leader's name."""
        found = ""

        async def is_whole() -> bool:
            nonlocal found
            answers = await asyncio.gather(*(self.status(name) for name in self.nodes))
            looks = [answer for answer in answers if answer is not None]
            leaders = [look for look in looks if look.role == "leader"]
            if len(looks) < len(self.nodes) or len(leaders) != 1:
                return False
            (leader,) = leaders
            if {(look.leader, look.term) for look in looks} != {(leader.name, leader.term)}:
                return False
            if {member.name for member in leader.members if member.voter} != set(self.nodes):
                return False
            found = leader.name
            # A node whose log is far behind will be needed soon: the next fault may take another.
            return all(leader.commit_index - look.applied_index < _CAUGHT_UP_ENTRIES for look in looks)

        await until(is_whole, within_s, "all nodes to follow one leader, and to have caught up", poll_s=0.05)
        return found

    # --- disks --------------------------------------------------------------------------------------------------------

    def fill_disk(self, name: str) -> None:
        """From now on no file of this node grows."""
        self._limit_files(name, _FULL_BYTES)

    def free_disk(self, name: str) -> None:
        self._limit_files(name, resource.RLIM_INFINITY)

    def _limit_files(self, name: str, size_bytes: int) -> None:
        process = self.nodes[name].process
        assert process is not None, f"{name} was not started"
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        soft = hard if size_bytes == resource.RLIM_INFINITY else size_bytes
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soft, hard))

    def disk_bytes(self) -> int:
        """What the nodes' directories hold now."""
        size_bytes = 0
        for node in self.nodes.values():
            for where, _, files in os.walk(node.data_dir):
                for file in files:
                    with contextlib.suppress(FileNotFoundError):  # the node dropped it meanwhile
                        size_bytes += (Path(where) / file).lstat().st_size
        return size_bytes


# An entry holds whatever arrived while the last was on its way: so many are well under a second's work.
_CAUGHT_UP_ENTRIES = 200


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])
