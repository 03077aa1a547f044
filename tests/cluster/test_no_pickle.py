"""No pickle is read from disk or network: a cluster lives its whole life where unpickling leaves a mark.

Writes, membership entries, the loss of a leader, restarts from disk, a snapshot to a node that was away, and peers and
clients that send pickles. (What is touched of pysyncobj's private names is held by `tests/unit/test_engine.py`.)
"""

from __future__ import annotations

import asyncio
import os
import pickle
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.harness import ROOT, ClusterProcesses, until
from tests.cluster.no_pickle_node import MARKER

pytestmark = pytest.mark.timeout(120)

# Several flushes, and after each the log's head is dropped: with small limits a node that missed it needs a snapshot.
MISSED_WAVES, MISSED_PUTS, MISSED_BYTES = 20, 50, 1000


async def test_nothing_is_ever_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "unpickled"
    cluster = ClusterProcesses(tmp_path, main="tests.cluster.no_pickle_node", environment={MARKER: str(marker)})
    async with cluster, cluster.client(timeout_s=20) as client:
        for number in range(50):
            await client.put(b"before/%d" % number, b"x")
        leader = await cluster.leader()
        await send_pickles(cluster, marker)

        cluster.kill(leader)
        for wave in range(MISSED_WAVES):
            keys = (b"missed/%d/%d" % (wave, number) for number in range(MISSED_PUTS))
            await asyncio.gather(*(client.put(key, b"x" * MISSED_BYTES) for key in keys))
        cluster.start(leader)
        await cluster.converged()

        async def installed() -> bool:
            return "installing a snapshot" in cluster.nodes[leader].log()

        await until(installed, 5, "the node that was away to be sent a snapshot")
        for name in cluster.nodes:
            cluster.stop(name)
        for name in cluster.nodes:
            cluster.start(name)
        assert (await client.range(prefix=b"", count_only=True)).count == 50 + MISSED_WAVES * MISSED_PUTS
        await cluster.converged()
        await send_pickles(cluster, marker)
        await client.put(b"after", b"x")
    assert not marker.exists(), f"unpickled: {marker.read_text()}"


class Exploit:
    """Whoever unpickles it creates a file, poisoned or not."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self._path, "w")


async def send_pickles(cluster: ClusterProcesses, marker: Path) -> None:
    """To every port of every node, as pysyncobj's own transport frames them, and bare."""
    pickled = pickle.dumps(Exploit(marker))
    compressed = zlib.compress(pickled)
    for node in cluster.nodes.values():
        for address in (node.peer_address, node.client_address):
            for order in ("<I", ">I"):
                for content in (pickled, compressed):
                    await send(address, struct.pack(order, len(content)) + content)


async def send(address: str, content: bytes) -> None:
    """Send it, and wait until the node has closed the connection or a moment has passed."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(content)
        writer.write_eof()
        with suppress(OSError):
            async with asyncio.timeout(5):
                await reader.read()
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


@pytest.mark.parametrize(
    "code",
    [
        "import pickle; pickle.loads(data)",
        "import io, pickle; pickle.load(io.BytesIO(data))",
        "import io, pickle; pickle.Unpickler(io.BytesIO(data)).load()",
        "import io, _pickle; _pickle.Unpickler(io.BytesIO(data)).load()",
        "import pysyncobj.pickle; pysyncobj.pickle.loads(data)",
        "import pysyncobj.journal; pysyncobj.journal.loads(data)",
        "import pysyncobj.syncobj; pysyncobj.syncobj.pickle.loads(data)",
    ],
)
def test_the_mark_would_be_left(tmp_path: Path, code: str) -> None:
    marker = tmp_path / "unpickled"
    setup = f"import tests.cluster.no_pickle_node as node; node.poison(); data = {pickle.dumps(1)!r}"
    done = subprocess.run(
        [sys.executable, "-c", f"{setup}; {code}"],
        cwd=ROOT,
        env={**os.environ, MARKER: str(marker)},
        capture_output=True,
        check=False,
    )
    assert b"Unpickled" in done.stderr
    assert marker.exists()
