"""A cluster of real processes on loopback, and what a test of failure does to them.

    async with ClusterProcesses(tmp_path, nodes=3) as cluster:
        leader = await cluster.leader()
        cluster.kill(leader)
        ...

Each node is `python -m kvstore.cli.main serve …` with its own directory, log file and free ports. Nothing here sleeps
for a fixed time: what takes time is waited for, within a deadline. When a test fails the nodes' last log lines are
printed.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import kvstore
from kvstore import Client, NodeStatus, codec
from kvstore.server.identity import cluster_id

ROOT = Path(__file__).parents[2]
TOKEN = "a token for tests"
# Generous: two cores may be shared with much else. A test that measures a time says so itself.
READY_S = 20.0
STOP_S = 10.0
_POLL_S = 0.02
_LOG_LINES_SHOWN = 40

Main = str
"""The module that a node's process runs: the command, or a test's own variant of it with the same arguments."""
COMMAND: Main = "kvstore.cli.main"


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now. All are held until all are found, so they differ.

    They lie below those that the system gives to outgoing connections: a client that tries a dead node's port again and
    again would one day be given that very port, be connected with itself, and keep the node from coming back.
    """
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = random.SystemRandom().sample(range(10_000, max(ephemeral, 20_000)), 1000)
    sockets: list[socket.socket] = []
    try:
        for port in candidates:
            if len(sockets) == count:
                break
            sockets.append(socket.socket())
            try:
                sockets[-1].bind(("127.0.0.1", port))
            except OSError:
                sockets.pop().close()
        assert len(sockets) == count, f"only {len(sockets)} of 1000 ports are free"
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


async def until(
    condition: Callable[[], Awaitable[object]], within_s: float, what: str, poll_s: float = _POLL_S
) -> None:
    """Wait until the condition holds; AssertionError past the limit."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    while not await condition():
        assert loop.time() < deadline, f"not within {within_s:g} s: {what}"
        await asyncio.sleep(poll_s)


class NodeProcess:
    """One node: its place, and its process while it has one."""

    def __init__(self, name: str, path: Path, peer_port: int, client_port: int) -> None:
        self.name = name
        self.data_dir = path / name
        self.log_path = path / f"{name}.log"
        self.peer_address = f"127.0.0.1:{peer_port}"
        self.client_address = f"127.0.0.1:{client_port}"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def run(self, main: Main, arguments: list[str], environment: Mapping[str, str], root: Path = ROOT) -> None:
        assert not self.running, f"{self.name} runs already"
        self.reap()
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", main, *arguments],
                cwd=root,
                env={**os.environ, "KVSTORE_CLUSTER_TOKEN": TOKEN, **environment},
                # With a parent it ends when the pipe does: then no node outlives whoever runs it, however that ends.
                stdin=subprocess.PIPE if "--with-parent" in arguments else subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None, f"{self.name} was not started"
        self.process.send_signal(number)

    def reap(self, within_s: float = STOP_S) -> int | None:
        """Wait for the process's end; its exit code (negative: the signal)."""
        if self.process is None:
            return None
        code = self.process.wait(within_s)
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process = None
        return code

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""


class ClusterProcesses:
    """See the module's docstring. Node names are n1, n2, …"""

    def __init__(
        self,
        path: Path,
        nodes: int = 3,
        *,
        main: Main = COMMAND,
        arguments: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self._main = main
        self._arguments = arguments
        self._environment = dict(environment or {})
        ports = free_ports(2 * nodes)
        self.nodes = {
            f"n{number + 1}": NodeProcess(f"n{number + 1}", path, ports[2 * number], ports[2 * number + 1])
            for number in range(nodes)
        }
        self._initial = tuple(self.nodes)
        self.knowing: set[str] = set()  # nodes whose directory alone says of which cluster they are

    # --- life ---------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> ClusterProcesses:
        for name in self.nodes:
            self.start(name)
        try:
            await self.leader()
        except BaseException:
            self.show_logs()
            self.kill_all()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.show_logs()
        self.kill_all()

    def kill_all(self) -> None:
        for node in self.nodes.values():
            if node.running:
                node.signal(signal.SIGKILL)
            node.reap()

    def show_logs(self) -> None:
        for node in self.nodes.values():
            print(f"--- {node.name}: {'running' if node.running else 'not running'}", file=sys.stderr)
            print("\n".join(node.log().splitlines()[-_LOG_LINES_SHOWN:]), file=sys.stderr)

    # --- nodes --------------------------------------------------------------------------------------------------------

    @property
    def endpoints(self) -> str:
        return ",".join(node.client_address for node in self.nodes.values())

    @property
    def cluster_id(self) -> str:
        return cluster_id(self._initial, TOKEN)

    @property
    def peers(self) -> str:
        """The initial members, as --peers takes them."""
        initial = (self.nodes[name] for name in self._initial)
        return ",".join(f"{node.name}={node.peer_address}/{node.client_address}" for node in initial)

    def serve_arguments(self, name: str) -> list[str]:
        node = self.nodes[name]
        where = ["--name", name, "--data-dir", str(node.data_dir)]
        if name in self._initial and name not in self.knowing:
            where += ["--peers", self.peers]
        else:
            where += ["--listen", node.peer_address, "--client-listen", node.client_address]
        return ["serve", *where, *self._arguments]

    def start(self, name: str) -> None:
        """Start a node, for the first time or again."""
        self.nodes[name].run(self._main, self.serve_arguments(name), self._environment)

    def join(self, name: str, *options: str) -> NodeProcess:
        """Start a new node with `kvstore join`."""
        peer_port, client_port = free_ports(2)
        through = self.endpoints
        node = self.nodes[name] = NodeProcess(name, self.path, peer_port, client_port)
        arguments = [
            "join", "--name", name, "--data-dir", str(node.data_dir), "--listen", node.peer_address,
            "--client-listen", node.client_address, "--endpoints", through, *options,
        ]  # fmt: skip
        node.run(self._main, arguments, self._environment)
        return node

    def kill(self, name: str) -> None:
        """SIGKILL, and wait until it is gone."""
        self.nodes[name].signal(signal.SIGKILL)
        self.nodes[name].reap()

    def pause(self, name: str) -> None:
        self.nodes[name].signal(signal.SIGSTOP)

    def resume(self, name: str) -> None:
        self.nodes[name].signal(signal.SIGCONT)

    def stop(self, name: str) -> int | None:
        """SIGTERM, and wait; the exit code."""
        self.nodes[name].signal(signal.SIGTERM)
        return self.nodes[name].reap()

    # --- what the cluster says ----------------------------------------------------------------------------------------

    def client(self, timeout_s: float = 5.0) -> Client:
        return kvstore.connect(self.endpoints, timeout_s=timeout_s)

    async def ask(self, name: str, frame: codec.ClientFrame, timeout_s: float) -> codec.ServerFrame | None:
        """What one node itself answers, without a client that would try the others; None if it does not in time."""
        host, port = self.nodes[name].client_address.split(":")
        with suppress(OSError, EOFError):  # TimeoutError is an OSError, IncompleteReadError an EOFError
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_connection(host, int(port))
                try:
                    hello = codec.Hello(1, codec.PROTOCOL_VERSION)
                    writer.write(codec.encode_frame(hello) + codec.encode_frame(frame))
                    while True:
                        size = int.from_bytes(await reader.readexactly(4), "big")
                        answer = codec.decode_server_frame(await reader.readexactly(size))
                        if not isinstance(answer, codec.Welcome):
                            return answer
                finally:
                    writer.close()
                    with suppress(OSError):
                        await writer.wait_closed()
        return None

    async def status(self, name: str, *, digest: bool = False, timeout_s: float = 1.0) -> NodeStatus | None:
        """What one node says of itself; None if it does not answer."""
        answer = await self.ask(name, codec.StatusRequest(2, digest), timeout_s)
        return answer.status if isinstance(answer, codec.StatusAnswer) else None

    async def leader(self, within_s: float = READY_S, *, other_than: str = "") -> str:
        """The name of a node that leads, as a majority of the running nodes agrees."""
        found = ""

        async def agreed() -> bool:
            nonlocal found
            running = [name for name, node in self.nodes.items() if node.running]
            answers = await asyncio.gather(*(self.status(name) for name in running))
            for answer in answers:
                if answer is None or answer.role != "leader" or answer.name == other_than:
                    continue
                term = answer.term
                following = [a for a in answers if a is not None and (a.leader, a.term) == (answer.name, term)]
                if 2 * len(following) > len(answer.members):
                    found = answer.name
                    return True
            return False

        await until(agreed, within_s, "a leader that a majority follows")
        return found

    async def converged(self, within_s: float = READY_S) -> str:
        """Wait until all running nodes have applied the same and hold the same state; its digest."""
        found = ""

        async def same() -> bool:
            nonlocal found
            running = [name for name, node in self.nodes.items() if node.running]
            looks = await asyncio.gather(*(self.status(name, digest=True, timeout_s=5.0) for name in running))
            states = {(look.applied_index, look.digest) for look in looks if look is not None}
            if None in looks or len({index for index, _ in states}) != 1:
                return False
            assert len(states) == 1, f"nodes applied the same entries and hold different states: {states}"
            found = states.pop()[1]
            return True

        await until(same, within_s, "all nodes having applied the same")
        return found


async def run_command(
    *arguments: str, environment: Mapping[str, str] | None = None, stdin: bytes = b"", main: Main = COMMAND
) -> tuple[int, str, str]:
    """Run a `kvstore` command to its end; (exit code, stdout, stderr)."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", main, *arguments,
        cwd=ROOT, env={**os.environ, "KVSTORE_CLUSTER_TOKEN": TOKEN, **(environment or {})},
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(30):
            out, err = await process.communicate(stdin)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return process.returncode, out.decode(errors="surrogateescape"), err.decode(errors="surrogateescape")
