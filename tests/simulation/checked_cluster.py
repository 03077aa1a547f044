"""Real `RaftNode`s in virtual time with the checks behind them: what the tests of the checks break."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from kvstore.raft import messages
from kvstore.raft.node import RaftNode
from kvstore.raft.wal import Wal
from tests.raft_cluster import Cluster
from tests.simulation.checks import RULES, Checks
from tests.simulation.ledger import Broken
from tests.simulation.outcome import Counts, Violation
from tests.simulation.watch import Watch

# Fake disks keep every zero of a segment in memory; and so logs go on in further ones, some of which are dropped.
SEGMENT_BYTES = 4096


class CheckedCluster(Cluster):
    """A `Cluster` with checks after each callback, as a `World` has them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counts = Counts()
        self.machines: dict[str, Any] = {}
        self.checks = Checks(self)  # type: ignore[arg-type]
        step = self.time._step

        def stepping(until_s: float) -> bool:
            stepped = step(until_s)
            self.look()
            return stepped

        self.time._step = stepping  # type: ignore[method-assign]

    def look(self) -> None:
        for machine in self.machines.values():
            if machine.node is not None:
                self.checks.observe(machine)

    def start(self, *names: str, **kwargs: Any) -> list[RaftNode]:
        with mock.patch.dict(Wal.open.__func__.__kwdefaults__, segment_bytes=SEGMENT_BYTES):  # type: ignore[attr-defined]
            nodes = super().start(*names, **kwargs)
        for name, node in zip(names, nodes, strict=True):
            machine = self.machines.setdefault(name, SimpleNamespace(name=name, expected_failures=set()))
            machine.files, machine.node = self.disk(name), SimpleNamespace(raft=node)
            self.checks.booted(machine)
        return nodes

    def crash(self, name: str, *args: Any, **kwargs: Any) -> None:
        self.checks.crashed(self.machines[name])
        self.machines[name].node = None
        super().crash(name, *args, **kwargs)

    def watch(self, name: str) -> Watch:
        return self.checks.watches[name]

    def lead_without(self, name: str) -> None:
        """Let the others elect a leader."""
        self.until(lambda: any(node.is_leader for other, node in self.nodes.items() if other != name))

    def silence(self, here: str, *others: str) -> None:
        """What `here` says reaches none of these."""
        for other in others:
            self.network.cut(here, other, one_way=True)


def running(voters: str = "abc", **kwargs: Any) -> CheckedCluster:
    """A cluster led by a, with a few entries."""
    cluster = CheckedCluster(voters, **kwargs)
    cluster.start(*voters)
    cluster.lead("a")
    cluster.commit("one", "two", "three")
    return cluster


def with_uncommitted(*texts: str) -> CheckedCluster:
    """The leader a and b hold entries that nobody can commit: what b and c say does not reach a."""
    cluster = running()
    cluster.network.cut("a", "c")
    cluster.silence("b", "a")
    for text in texts:
        cluster.propose(cluster.nodes["a"], text)
    last = cluster.wal("a").last_index + len(texts)
    cluster.until(lambda: cluster.wal("b").last_index == last)
    cluster.time.advance(0.01)
    assert cluster.nodes["b"].committed < last
    return cluster


@contextmanager
def violates(rule: str, *words: str) -> Iterator[None]:
    assert rule in RULES
    with pytest.raises(Violation) as caught:
        yield
    assert caught.value.rule == rule, caught.value
    for word in words:
        assert word in caught.value.message


@contextmanager
def breaks(rule: str) -> Iterator[None]:
    assert rule in RULES
    with pytest.raises(Broken) as caught:
        yield
    assert caught.value.rule == rule, caught.value


def say(cluster: CheckedCluster, name: str, peer: str, message: messages.Message) -> None:
    cluster.nodes[name]._transport.send(peer, messages.encode(message))
    cluster.look()
