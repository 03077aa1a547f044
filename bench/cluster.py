"""Our own side of the comparison: a cluster of real node processes with fsync on, or one that is running already.

Set-up goes through a plain blocking connection (`Caller`); the load itself is the generator's.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from msgspec import Raw

from bench.processes import Server, free_ports, wait_until
from bench.results import BenchError
from kvstore import codec, model
from kvstore.env import split_address
from kvstore.errors import KvError, error_for

NODES = 3
# A node of this machine answers within milliseconds; past this something hangs.
_ANSWER_S = 10.0
# Set-up sends this many writes before it reads their answers: well below the 1,024 results that a session may hold.
_WINDOW = 256


class Caller:
    """One blocking connection to one node, for set-up. Raises BenchError for whatever is no success."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._id = 0
        try:
            self._socket = socket.create_connection(split_address(address), _ANSWER_S)
        except (OSError, ValueError) as error:
            raise BenchError(f"cannot connect to {address}: {error}") from None
        self._reader = codec.FrameReader()
        self._frames: list[bytes] = []

    def close(self) -> None:
        self._socket.close()

    def hello(self) -> codec.Welcome:
        answer = self._call(codec.Hello(self._next_id(), codec.PROTOCOL_VERSION))
        if not isinstance(answer, codec.Welcome):
            raise BenchError(f"{self.address} answered Hello with {answer!r}")
        return answer

    def status(self) -> model.NodeStatus:
        answer = self._call(codec.StatusRequest(self._next_id()))
        if not isinstance(answer, codec.StatusAnswer):
            raise BenchError(f"{self.address} answered a status request with {answer!r}")
        return answer.status

    def write_all(self, requests: Iterable[model.Mutation]) -> None:
        """Do all of them, some at a time, without a session: they may be done twice."""
        waiting = 0
        for request in requests:
            self._send(codec.Write(self._next_id(), 0, 0, 0, Raw(codec.encode_request(request))))
            waiting += 1
            if waiting == _WINDOW:
                self._expect_success(waiting)
                waiting = 0
        self._expect_success(waiting)

    def _expect_success(self, count: int) -> None:
        for _ in range(count):
            answer = self._receive()
            result = codec.decode_result(answer.result) if isinstance(answer, codec.Answer) else answer
            if isinstance(result, (codec.Failure, model.ErrorResult)):
                raise BenchError(f"{self.address} refused to be prepared: {error_for(result.code, result.message)}")

    def _next_id(self) -> int:
        self._id += 1
        return self._id

    def _call(self, frame: codec.Frame) -> codec.ServerFrame:
        self._send(frame)
        return self._receive()

    def _send(self, frame: codec.Frame) -> None:
        try:
            self._socket.sendall(codec.encode_frame(frame))
        except OSError as error:
            raise BenchError(f"{self.address}: {error}") from None

    def _receive(self) -> codec.ServerFrame:
        while not self._frames:
            try:
                data = self._socket.recv(1 << 18)
            except OSError as error:
                raise BenchError(f"{self.address}: {error}") from None
            if not data:
                raise BenchError(f"{self.address} closed the connection")
            try:
                self._frames = list(self._reader.feed(data))
            except KvError as error:
                raise BenchError(f"{self.address}: {error}") from None
        return codec.decode_server_frame(self._frames.pop(0))


class Cluster:
    """Three nodes, started here, or the endpoints of others. `leader` and `pids` hold from `start` on."""

    def __init__(self, endpoints: list[str]) -> None:
        self._given = endpoints
        self._servers: dict[str, Server] = {}
        self._started = False
        self.endpoints = list(endpoints)
        self.leader = ""

    @property
    def pids(self) -> Mapping[str, list[int]]:
        """Process ids by role, of nodes that we started."""
        followers = [server.pid for address, server in self._servers.items() if address != self.leader]
        return {"leader": [self._servers[self.leader].pid], "followers": followers} if self._servers else {}

    def start(self, scratch: Path) -> None:
        """Start the nodes below `scratch` and wait for a leader. Raises BenchError."""
        if not self._given:
            ports = free_ports(2 * NODES)
            names = [f"n{turn + 1}" for turn in range(NODES)]
            self.endpoints = [f"127.0.0.1:{port}" for port in ports[NODES:]]
            members = ",".join(
                f"{name}=127.0.0.1:{port}/{client}"
                for name, port, client in zip(names, ports, self.endpoints, strict=False)
            )
            for name, client in zip(names, self.endpoints, strict=True):
                command = serve_command(name, scratch / name, members)
                log = scratch / f"{name}.log"
                self._servers[client] = Server(f"node {name}", command, log, environment=environment())
        self.leader = wait_until("a leader", self._find_leader, list(self._servers.values()))

    def prepare(self, keys: Iterable[model.Mutation]) -> None:
        caller = Caller(self.leader)
        try:
            caller.hello()
            caller.write_all(keys)
        finally:
            caller.close()

    def check(self) -> None:
        """Raises BenchError if a node has ended, or the leader is another one: then the figures mix two things."""
        for server in self._servers.values():
            server.check()
        leader = self._find_leader()
        if leader != self.leader:
            raise BenchError(f"the leader moved from {self.leader} to {leader or 'nobody'} during the run")

    def stop(self) -> None:
        for server in self._servers.values():
            server.stop()
        self._servers.clear()

    def _find_leader(self) -> str | None:
        """The client address of the node that says it leads, of those that we were given."""
        for address in self.endpoints:
            try:
                caller = Caller(address)
            except BenchError:  # not listening yet, or gone: `wait_until` looks at whether it ended
                continue
            try:
                caller.hello()
                status = caller.status()
                if status.leader and status.leader == status.name:
                    return address
            except BenchError:  # it closed while it is starting
                continue
            finally:
                caller.close()
        return None


def serve_command(name: str, data: Path, members: str) -> list[str]:
    """The command line of one node of a new cluster: everything at its default. It ends with this process."""
    command = [sys.executable, "-m", "kvstore.cli.main", "serve", "--name", name, "--data-dir", str(data)]
    return [*command, "--peers", members, "--cluster-token", "bench", "--with-parent"]


def environment() -> dict[str, str]:
    """Ours, but with this checkout first, whatever directory we were started from."""
    checkout = str(Path(__file__).parent.parent)
    others = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{others}" if others else checkout}
