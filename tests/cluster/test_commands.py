"""The client commands against a real node."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from kvstore.client.lock import lock_prefix
from tests.cluster.harness import COMMAND, ROOT, ClusterProcesses, run_command, until

pytestmark = pytest.mark.timeout(120)

# Two cores may be shared with much else.
WITHIN_S = 20.0

Run = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest_asyncio.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[ClusterProcesses]:
    async with ClusterProcesses(tmp_path, nodes=1) as cluster:
        yield cluster


@pytest.fixture
def kv(cluster: ClusterProcesses) -> Run:
    async def run(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        return await run_command(*arguments, environment={"KVSTORE_ENDPOINTS": cluster.endpoints}, stdin=stdin)

    return run


async def test_put_get_del_and_range(kv: Run) -> None:
    assert (await kv("put", "a/1", "one"))[:2] == (0, "revision 1\n")
    assert (await kv("put", "a/2", "-", stdin=b"\xff\x00two"))[0] == 0
    assert (await kv("get", "a/2", "--value-only"))[:2] == (0, "\udcff\x00two")
    code, out, _ = await kv("get", "a/2", "--output", "json")
    record = json.loads(out)
    assert (code, record["value"], record["value_encoding"], record["mod_revision"]) == (0, "/wB0d28=", "base64", 2)
    code, out, _ = await kv("range", "a/", "--prefix", "-o", "json")
    document = json.loads(out)
    assert [record["key"] for record in document["records"]] == ["a/1", "a/2"]
    assert (document["count"], document["more"], document["revision"]) == (2, False, 2)
    code, out, _ = await kv("range", "--count-only")
    assert (code, out) == (0, "0 of 2, revision 2\n")
    code, out, _ = await kv("range", "--keys-only", "--reverse")
    assert (code, out) == (0, "a/2\na/1\n")
    code, out, _ = await kv("get", "612f31", "--encoding", "hex")
    assert code == 0
    assert "6f6e65" in out
    assert (await kv("del", "a/", "--prefix"))[:2] == (0, "deleted 2, revision 3\n")
    code, out, err = await kv("get", "a/1")
    assert (code, out) == (6, "")
    assert "no such key" in err
    code, out, _ = await kv("get", "a/1", "--revision", "1", "--level", "local")
    assert code == 0
    assert "one" in out
    assert (await kv("put", "a/1", "-5"))[:2] == (0, "revision 4\n")
    assert (await kv("get", "a/1", "--value-only"))[:2] == (0, "-5")


async def test_txn(kv: Run) -> None:
    await kv("put", "stock", "1")
    order = b"""{"compare": [{"key": "order", "target": "version", "relation": "==", "operand": 0}],
                 "success": [{"add": {"key": "stock", "delta": -1, "min": 0}}, {"put": {"key": "order", "value": "x"}}],
                 "failure": [{"range": {"start": "order"}}]}"""
    code, out, _ = await kv("txn", stdin=order)
    assert (code, out.splitlines()[0]) == (0, "succeeded, revision 2")
    code, out, _ = await kv("txn", "-o", "json", stdin=order)
    document = json.loads(out)["txn"]
    assert (code, document["succeeded"]) == (0, False)
    assert document["results"][0]["range"]["records"][0]["value"] == "x"
    code, out, err = await kv("txn", stdin=order.replace(b'"order"', b'"another"'))
    assert (code, out) == (1, "")
    assert "[out_of_range] (operation 0)" in err


async def test_status_members_and_limits(kv: Run, cluster: ClusterProcesses) -> None:
    code, out, _ = await kv("status", "--digest", "-o", "json")
    (node,) = json.loads(out)
    assert code == 0
    assert (node["status"]["role"], node["status"]["leader"], node["status"]["cluster_id"]) == (
        "leader",
        "n1",
        cluster.cluster_id,
    )
    assert len(node["status"]["digest"]) >= 32
    code, out, _ = await kv("member", "list", "-o", "json")
    (member,) = json.loads(out)
    assert (code, member["name"], member["voter"]) == (0, "n1", True)
    for arguments in (["status"], ["member", "list"]):
        code, out, _ = await kv(*arguments)
        assert code == 0
        assert cluster.nodes["n1"].client_address in out
    code, _, err = await kv("put", "k" * 5000, "v")
    assert (code, "[key_too_large]" in err) == (1, True)
    code, _, err = await kv("leave", "n1")
    assert (code, "[would_lose_quorum]" in err) == (1, True)
    assert (await kv("transfer-leader", "n1"))[:2] == (0, "n1 leads\n")
    code, _, err = await kv("leave", "n7")
    assert (code, "[member_unknown]" in err) == (1, True)


async def test_leases(kv: Run) -> None:
    code, out, _ = await kv("lease", "grant", "60", "--id", "7", "-o", "json")
    assert (code, json.loads(out)) == (0, {"lease": 7, "ttl_ms": 60_000})
    assert (await kv("lease", "grant", "60", "--id", "7"))[0] == 1
    assert (await kv("put", "a", "1", "--lease", "7"))[:2] == (0, "revision 1\n")
    code, out, _ = await kv("lease", "show", "7", "--keys", "-o", "json")
    shown = json.loads(out)
    assert (code, shown["keys"], shown["key_count"]) == (0, ["a"], 1)
    assert 0 < shown["remaining_ms"] <= 60_000
    assert (await kv("lease", "list"))[:2] == (0, "7\n")
    code, out, _ = await kv("lease", "keep-alive", "7", "--once")
    assert code == 0
    assert "lives another 60 s" in out
    assert (await kv("lease", "revoke", "7"))[:2] == (0, "lease 7 ended, deleted 1, revision 2\n")
    code, _, err = await kv("lease", "show", "7")
    assert code == 1
    assert "lease_not_found" in err
    assert (await kv("lease", "grant", "0.5"))[0] == 2


async def test_a_command_under_a_lock(kv: Run) -> None:
    show = ("sh", "-c", "echo $KVSTORE_LOCK_TOKEN; exit 7")
    code, out, _ = await kv("lock", "job", *show)
    assert code == 7
    first = int(out)
    code, out, _ = await kv("lock", "job", "--", *show)
    assert (code, int(out) > first) == (7, True)
    # While it is held nobody else gets it; who waits does, afterwards.
    holding = asyncio.ensure_future(kv("lock", "job", "sh", "-c", "echo in; sleep 1"))
    code, err = 0, ""
    while code == 0:  # until the holder has it
        code, _, err = await kv("lock", "job", "--wait", "0", "true")
    assert code == 3
    assert "lock_held" in err
    assert (await kv("lock", "job", "true"))[0] == 0
    assert (await holding)[:2] == (0, "in\n")
    code, _, err = await kv("lock", "job", "no-such-command")
    assert code == 1
    assert "cannot run" in err
    assert (await kv("lock", "job", "sh", "-c", "kill -9 $$"))[0] == 137


async def test_a_command_whose_lock_is_lost_is_ended(kv: Run) -> None:
    holding = asyncio.ensure_future(kv("lock", "job", "--ttl", "1", "sleep", "20"))
    leases: list[int] = []
    while not leases:
        leases = json.loads((await kv("lease", "list", "-o", "json"))[1])
    assert (await kv("lease", "revoke", str(leases[0])))[0] == 0
    code, _, err = await holding
    assert code == 3
    assert "lock_lost" in err


class Locked:
    """`kvstore lock job -- sh -c SCRIPT` as a process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.command_pid = 0

    async def running(self) -> None:
        """Its command runs, and has said which process it is."""
        assert self.process.stdout is not None
        async with asyncio.timeout(WITHIN_S):
            self.command_pid = int(await self.process.stdout.readline())

    async def end(self) -> tuple[int, bytes]:
        async with asyncio.timeout(WITHIN_S):
            said, _ = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, said

    async def is_command_gone(self) -> bool:
        try:
            state = Path(f"/proc/{self.command_pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        return state == "Z"


Begin = Callable[..., Awaitable[Locked]]


@pytest.fixture
async def begin(cluster: ClusterProcesses) -> AsyncIterator[Begin]:
    begun: list[Locked] = []

    async def begin(script: str, under: tuple[str, ...] = ()) -> Locked:
        process = await asyncio.create_subprocess_exec(
            *under, sys.executable, "-m", COMMAND, "lock", "job", "--ttl", "2", "--", "sh", "-c", f"echo $$; {script}",
            cwd=ROOT, env={**os.environ, "KVSTORE_ENDPOINTS": cluster.endpoints},
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        begun.append(Locked(process))
        return begun[-1]

    yield begin
    for each in begun:
        if each.process.returncode is None:
            each.process.kill()
        if each.command_pid and not await each.is_command_gone():  # where it fails
            os.kill(each.command_pid, signal.SIGKILL)
        await each.end()  # its output, too: what the command had open is closed a moment later


SIGNALS = (signal.SIGTERM, signal.SIGHUP)


async def test_a_signalled_command_ends_before_its_lock_is_given_up(begin: Begin, kv: Run) -> None:
    for number in SIGNALS:
        # It takes a while to end, and says that it has.
        holder = await begin("trap 'sleep 0.5; echo ended; exit 9' TERM HUP; while :; do sleep 0.05; done")
        await holder.running()
        look = f"kill -0 {holder.command_pid} 2>&- || echo alone"
        waiting = asyncio.ensure_future(kv("lock", "job", "--", "sh", "-c", look))
        await asyncio.sleep(0.2)
        holder.process.send_signal(number)
        assert await holder.end() == (9, b"ended\n")
        assert (await waiting)[:2] == (0, "alone\n")


async def test_lock_ends_as_its_signalled_command_does(begin: Begin) -> None:
    for number in SIGNALS:
        holder = await begin("exec sleep 30")
        await holder.running()
        holder.process.send_signal(number)
        assert await holder.end() == (128 + number, b"")
        assert await holder.is_command_gone()


async def test_a_signalled_waiter_leaves_the_line(begin: Begin, cluster: ClusterProcesses) -> None:
    holder = await begin("exec sleep 30")
    await holder.running()
    async with cluster.client() as client:

        async def in_line(count: int) -> bool:
            return (await client.range(prefix=lock_prefix("job"), count_only=True)).count == count

        for number in SIGNALS:
            waiter = await begin("exec sleep 30")
            await until(lambda: in_line(2), WITHIN_S, "it has its place")
            waiter.process.send_signal(number)
            assert await waiter.end() == (128 + number, b""), "its command never ran"
            assert await in_line(1)


async def test_a_command_is_killed_with_who_holds_its_lock(begin: Begin) -> None:
    holder = await begin("trap '' TERM HUP; exec sleep 30")
    await holder.running()
    holder.process.kill()
    await until(holder.is_command_gone, WITHIN_S, "nobody runs without the lock")


async def test_what_nohup_ignores_stays_ignored(begin: Begin) -> None:
    for under, ignored in (((), 0), (("nohup",), 1)):
        holder = await begin("exec sleep 30", under)
        await holder.running()
        status = Path(f"/proc/{holder.process.pid}/status").read_text()
        mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:"))
        assert int(mask, 16) >> (signal.SIGHUP - 1) & 1 == ignored
        holder.process.terminate()
        assert await holder.end() == (128 + signal.SIGTERM, b"")


async def test_watch_shows_what_changes(kv: Run) -> None:
    await kv("put", "a/1", "one")
    await kv("put", "a/1", "two")
    await kv("del", "a/1")
    await kv("put", "b", "other")
    code, out, _ = await kv("watch", "a/", "--prefix", "--from-revision", "1", "--prev", "--count", "3")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["1", "put", "a/1", "=", "one"],
        ["2", "put", "a/1", "=", "two", "(before:", "one)"],
        ["3", "del", "a/1", "(before:", "two)"],
    ]
    code, out, _ = await kv(
        "watch", "--from-revision", "2", "--count", "3", "--no-deletes", "--count", "2", "-o", "json"
    )
    assert [json.loads(line)["record"]["value"] for line in out.splitlines()] == ["two", "other"]
    assert (await kv("compact", "3"))[:2] == (0, "compacted up to revision 3\n")
    code, _, err = await kv("watch", "--from-revision", "2")
    assert code == 1
    assert "revision_compacted" in err
    code, _, err = await kv("watch", "--from-revision", "200")
    assert code == 1
    assert "revision_in_future" in err
    assert (await kv("watch", "--no-puts", "--no-deletes"))[0] == 2
    for end in ("b", "a"):
        code, _, err = await kv("watch", "b", end)
        assert code == 1
        assert "invalid_range" in err
