"""The services as processes: start, refuse to start, stop; and the commands of `python -m services`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import aiohttp
import pytest

from tests.cluster.harness import ClusterProcesses, free_ports, until
from tests.services.processes import ServiceProcess, command

PASSWORD = "correct horse battery staple"


async def test_sigterm_lets_running_requests_finish(tmp_path: Path) -> None:
    async with (
        ClusterProcesses(tmp_path, nodes=1) as cluster,
        ServiceProcess("users", cluster.endpoints, tmp_path) as users,
        aiohttp.ClientSession() as session,
    ):

        async def register(number: int) -> int:
            body = {"email": f"a{number}@example.com", "password": PASSWORD, "name": "Ada", "age": 36}
            async with session.post(f"{users.url}/v1/users", json=body) as answer:
                return answer.status

        # Hashing takes two dozen milliseconds each, so when the first is answered the others are under way.
        running = [asyncio.ensure_future(register(number)) for number in range(16)]
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        code = await users.stop()
        assert [await one for one in running] == [201] * 16
        assert code == 0
        log = [json.loads(line) for line in users.log().splitlines()]
        events = [line["event"] for line in log if line["event"] != "request"]
        assert events == ["listening", "stopping", "stopped"]
        assert all(line["service"] == "users" for line in log)
        requests = [line for line in log if line["event"] == "request" and line["path"] == "/v1/users"]
        assert len(requests) == 16
        assert PASSWORD not in users.log()


async def test_without_a_store_a_service_lives_and_is_not_ready(tmp_path: Path) -> None:
    (nobody,) = free_ports(1)
    async with (
        ServiceProcess("orders", f"127.0.0.1:{nobody}", tmp_path, wait_for="/livez") as orders,
        aiohttp.ClientSession() as session,
    ):
        async with session.get(f"{orders.url}/readyz") as answer:
            assert answer.status == 503
            assert (await answer.json(content_type=None))["code"] == "store_unavailable"
            assert answer.headers["Retry-After"] == "1"
        assert await orders.stop() == 0


async def test_a_port_in_use(tmp_path: Path) -> None:
    (nobody,) = free_ports(1)
    async with ServiceProcess("orders", f"127.0.0.1:{nobody}", tmp_path, wait_for="/livez") as orders:
        port = orders.url.rpartition(":")[2]
        code, output = await command("orders", "--port", port, "--endpoints", f"127.0.0.1:{nobody}")
    assert code == 1
    assert "[address_in_use]" in output


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


async def test_several_workers_on_one_port(tmp_path: Path) -> None:
    async with (
        ClusterProcesses(tmp_path, nodes=1) as cluster,
        ServiceProcess("orders", cluster.endpoints, tmp_path, "--workers", "3") as orders,
    ):
        assert orders.process is not None
        parent = orders.process.pid

        async def ask(path: str) -> str:
            async with aiohttp.ClientSession() as session, session.get(orders.url + path) as answer:
                assert answer.status == 200
                return await answer.text()

        async def all_up() -> bool:
            return orders.log().count('"listening"') >= 3

        await until(all_up, 20.0, "three workers")
        first = children_of(parent)
        assert len(first) == 3
        for _ in range(30):
            await ask("/livez")
        # Whichever is asked answers for all.
        counted = [line for line in (await ask("/metrics")).splitlines() if 'path="/livez"' in line]
        assert any(line.startswith("http_request_seconds_count") and float(line.split()[-1]) >= 30 for line in counted)

        os.kill(first[0], signal.SIGKILL)

        async def another() -> bool:
            now = children_of(parent)
            return len(now) == 3 and first[0] not in now and orders.log().count('"listening"') >= 4

        await until(another, 20.0, "another worker")
        second = children_of(parent)
        assert await orders.stop() == 0
        assert not any(is_alive(pid) for pid in second)


async def test_workers_end_with_who_looks_after_them(tmp_path: Path) -> None:
    (nobody,) = free_ports(1)
    endpoints = f"127.0.0.1:{nobody}"
    async with ServiceProcess("orders", endpoints, tmp_path, "--workers", "2", wait_for="/livez") as orders:
        assert orders.process is not None
        workers = children_of(orders.process.pid)
        port = orders.url.rpartition(":")[2]
        code, output = await command("orders", "--port", port, "--endpoints", endpoints, "--workers", "2")
        assert (code, "[address_in_use]" in output) == (1, True)
        orders.process.kill()

        async def none_left() -> bool:
            return not any(is_alive(pid) for pid in workers)

        await until(none_left, 20.0, "no worker")


@pytest.mark.parametrize("service", ["users", "orders"])
async def test_a_public_address_needs_insecure(service: str) -> None:
    code, output = await command(service, "--host", "0.0.0.0", "--port", "0")
    assert code == 1
    assert "[address_not_loopback]" in output
    assert "--insecure" in output


@pytest.mark.parametrize("endpoints", ["", "nonsense", "127.0.0.1:99999"])
async def test_endpoints_that_are_none(endpoints: str) -> None:
    code, output = await command("orders", "--port", "0", "--endpoints", endpoints)
    assert code == 1
    assert "Traceback" not in output


async def test_create_staff(tmp_path: Path) -> None:
    async with (
        ClusterProcesses(tmp_path, nodes=1) as cluster,
        ServiceProcess("users", cluster.endpoints, tmp_path) as users,
        aiohttp.ClientSession() as session,
    ):
        create = ["create-staff", "--endpoints", cluster.endpoints, "--email", "boss@example.com"]

        async def sign_in(password: str) -> int:
            body = {"email": "boss@example.com", "password": password}
            async with session.post(f"{users.url}/v1/sessions", json=body) as answer:
                return answer.status

        code, output = await command(*create, "--password-stdin", stdin="short\n")
        assert (code, "8 to 128" in output) == (1, True)
        code, output = await command(*create, "--password-stdin", stdin="password\n")
        assert (code, "[common_password]" in output) == (1, True)
        code, output = await command(*create, "--password-stdin", stdin=f"{PASSWORD}\n")
        assert code == 0, output
        assert await sign_in(PASSWORD) == 201
        code, output = await command(*create, STAFF_PASSWORD="another good password")
        assert (code, "[email_taken]" in output) == (1, True)
        code, output = await command(*create, "--replace", STAFF_PASSWORD="another good password")
        assert code == 0, output
        assert await sign_in(PASSWORD) == 401
        assert await sign_in("another good password") == 201
        async with cluster.client() as store:
            (record,) = (await store.range(prefix=b"user/")).records
        assert json.loads(record.value)["role"] == "staff"
        code, output = await command(*create, "--replace", "--role", "admin", STAFF_PASSWORD="another good password")
        assert (code, "admin account" in output) == (0, True), output
        code, output = await command(*create, "--replace", STAFF_PASSWORD="another good password")
        assert (code, "[last_admin]" in output) == (1, True)
        assert (await command("rotate-keys", "--endpoints", cluster.endpoints))[0] == 0
        async with cluster.client() as store:
            assert len((await store.range(prefix=b"signing-key/")).records) == 2
            entries = (await store.range(prefix=b"audit/")).records
        assert json.loads(entries[0].value)["action"] == "signing_keys_rotated"
        for option, value in (("--mailer", "no.such:thing"), ("--trusted-proxy", "nowhere")):
            code, output = await command("users", "--endpoints", cluster.endpoints, option, value)
            assert (code, value.partition(":")[0] in output) == (1, True), output
