"""All processes of a shop, on loopback, and what is done to them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from tests.cluster.harness import ClusterProcesses, free_ports, until
from tests.services.processes import Process, ServiceProcess, WorkerProcess

# Longer than a cold start on two busy cores takes, or an election while all processes fight for them.
READY_S = 60.0
_STATUS_S = 5.0
_NEVER_IN_A_LOG = re.compile(rb'"exception":"|Traceback \(most recent call last\)')
_LINE_CHARS = 1500


class Shop:
    """`async with Shop.open(path, …) as shop`. `services` are by name, as kills know them."""

    def __init__(self, cluster: ClusterProcesses, services: dict[str, Process]) -> None:
        self.cluster = cluster
        self.services = services
        self.down: set[str] = set()
        """What was killed and is not to run now."""

    @classmethod
    @asynccontextmanager
    async def open(
        cls, path: Path, *, pay_within_minutes: float, seed: int, rates: dict[str, float]
    ) -> AsyncIterator[Shop]:
        """`rates` are the provider's failures, from its start and after every restart."""
        async with ClusterProcesses(path, 3) as cluster, AsyncExitStack() as stack:
            endpoints = cluster.endpoints
            orders_port, other_port, psp_port = free_ports(3)
            failures = [f"--failure={kind}={rate}" for kind, rate in rates.items()]
            psp = ServiceProcess(
                "sandbox-psp", None, path, f"--seed={seed}", f"--data-dir={path / 'psp'}",
                f"--webhook-url=http://127.0.0.1:{orders_port}/v1/webhooks/sandbox", *failures, port=psp_port,
            )  # fmt: skip
            options = ("--psp-url", psp.url, "--pay-within-minutes", str(pay_within_minutes))
            services: dict[str, Process] = {
                "psp": psp,
                "users": ServiceProcess("users", endpoints, path),
                "orders 1": ServiceProcess("orders", endpoints, path, *options, port=orders_port),
                "orders 2": ServiceProcess("orders", endpoints, path, *options, port=other_port),
                "worker 1": WorkerProcess(endpoints, path, "--psp-url", psp.url, name="worker-1"),
                "worker 2": WorkerProcess(endpoints, path, "--psp-url", psp.url, name="worker-2"),
            }
            for service in services.values():
                await stack.enter_async_context(service)
            yield cls(cluster, services)

    def url(self, name: str) -> str:
        service = self.services[name]
        assert isinstance(service, ServiceProcess), name
        return service.url

    @property
    def names(self) -> list[str]:
        return [*self.cluster.nodes, *self.services]

    def kill(self, name: str) -> None:
        """SIGKILL, and wait until it is gone."""
        self.down.add(name)
        if name in self.services:
            self.services[name].kill()
        else:
            self.cluster.kill(name)

    async def start(self, name: str) -> None:
        """Start what was killed, and wait until it does its work. Raises AssertionError if it does not."""
        if name in self.services:
            service = self.services[name]
            service.start()
            self.down.discard(name)
            async with asyncio.timeout(READY_S):
                while not await _is_ready(service):
                    pass
        else:
            self.cluster.start(name)
            self.down.discard(name)
            await self.leader()

    async def leader(self) -> str:
        """A node that says that it leads, in the newest term that any has heard of. Raises AssertionError."""
        found = ""

        async def is_known() -> bool:
            nonlocal found
            running = [name for name, node in self.cluster.nodes.items() if node.running]
            answers = await asyncio.gather(*(self.cluster.status(name, timeout_s=_STATUS_S) for name in running))
            looks = [answer for answer in answers if answer is not None]
            term = max((look.term for look in looks), default=0)
            found = next((look.name for look in looks if look.role == "leader" and look.term == term), "")
            return bool(found)

        await until(is_known, READY_S, "a leader", poll_s=0.1)
        return found

    def fallen(self) -> list[str]:
        """Processes that ended by themselves."""
        nodes = {name for name, node in self.cluster.nodes.items() if not node.running}
        services = {name for name, service in self.services.items() if not service.running}
        return sorted((nodes | services) - self.down)

    def outcries(self) -> list[str]:
        """Lines of the services' logs that tell of an exception which nobody expected."""
        found = []
        for name, service in self.services.items():
            with service.log_path.open("rb") as log:
                found += [
                    f"{name}: {line[:_LINE_CHARS].decode(errors='replace').strip()}"
                    for line in log
                    if _NEVER_IN_A_LOG.search(line)
                ]
        return found


async def _is_ready(service: Process) -> bool:
    """False if it is not yet, after its usual time. Raises AssertionError if it has ended."""
    try:
        await service.ready()
    except AssertionError:
        if not service.running:
            raise
        return False
    return True
