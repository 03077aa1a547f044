"""What a node tells Prometheus: read at each scrape from what the parts count anyway."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import CollectorRegistry

from kvstore import model
from kvstore.meters import BOUNDS_S, Meter
from kvstore.server.native import NativeStats
from kvstore.server.quota import QUOTA


class Observed(Protocol):
    """What is asked of the node."""

    def status(self) -> model.NodeStatus: ...

    def why_not_serving(self) -> str: ...

    @property
    def leader_changes(self) -> int: ...

    def queues(self) -> dict[str, int]: ...

    def times(self) -> dict[str, Meter]: ...

    def proposed(self) -> tuple[int, int]: ...

    def watchers(self) -> tuple[int, int]: ...

    def state(self) -> dict[str, int | str]: ...

    def door_stats(self) -> NativeStats | None: ...


_TIMES = {
    "commit": "From proposing a log entry on this leader to its answers.",
    "fsync": "Syncing the log.",
    "apply": "Applying what was committed, in one turn.",
}


class NodeCollector:
    """Collects one node's metrics; registered with a registry of its own."""

    def __init__(self, node: Observed) -> None:
        self._node = node

    def collect(self) -> Iterator[Any]:
        node = self._node
        status = node.status()
        yield _labelled("kvstore_node", "Who this node is.", ("name", "cluster", "version"),
                        [((status.name, status.cluster_id, status.version), 1)])  # fmt: skip
        roles = ("leader", "follower", "candidate", "learner", "removed", "failed")
        yield _labelled("kvstore_role", "1 for the role that it has.", ("role",),
                        [((role,), role == status.role) for role in roles])  # fmt: skip
        yield _gauge("kvstore_has_leader", "1 if this node knows a leader.", bool(status.leader))
        yield _gauge("kvstore_storage_failed", "1 if its disk failed: it takes no writes.", bool(status.storage_error))
        yield _counter("kvstore_leader_changes", "How often this node began or ceased to lead.", node.leader_changes)
        for name, value in (
            ("term", status.term),
            ("commit_index", status.commit_index),
            ("applied_index", status.applied_index),
            ("last_index", status.last_index),
            ("durable_index", status.durable_index),
            ("revision", status.revision),
            ("cluster_version", status.cluster_version),
        ):
            yield _gauge(f"kvstore_{name}", f"The {name.replace('_', ' ')} of this node.", value)
        lags = [((peer.name,), max(0, status.last_index - peer.match_index)) for peer in status.peers]
        yield _labelled("kvstore_peer_lag_entries", "Entries that a peer lacks, as this leader knows.", ("peer",),
                        lags if status.role == "leader" else [])  # fmt: skip
        yield _labelled("kvstore_peer_connected", "1 if this node is connected with it.", ("peer",),
                        [((peer.name,), peer.connected) for peer in status.peers])  # fmt: skip
        entries, requests = node.proposed()
        yield _counter("kvstore_proposed_entries", "Log entries that this node proposed.", entries)
        yield _counter("kvstore_proposed_requests", "Requests in them.", requests)
        for name, meter in node.times().items():
            yield _histogram(f"kvstore_{name}_seconds", _TIMES[name], meter)
        yield _labelled("kvstore_waiting", "What waits, by queue.", ("queue",),
                        [((queue,), depth) for queue, depth in node.queues().items()])  # fmt: skip
        watches, lagging = node.watchers()
        yield _gauge("kvstore_watches", "Watches on this node.", watches)
        yield _gauge("kvstore_watches_lagging", "Those of them that do not have everything yet.", lagging)
        state = node.state()
        sizes = [((what,), int(state[f"{what}_bytes"])) for what in ("records", "history")]
        yield _labelled("kvstore_size_bytes", "What the state holds.", ("of",), sizes)
        yield _labelled("kvstore_alarm", "1 while it lasts.", ("alarm",), [((QUOTA,), QUOTA in status.alarms)])
        for name in ("sessions", "leases", "compacted_revision"):
            yield _gauge(f"kvstore_{name}", f"{name.replace('_', ' ').capitalize()} in the state.", int(state[name]))
        stats = node.door_stats()
        if stats is not None:
            yield from _door(stats)


def _door(stats: NativeStats) -> Iterator[Any]:
    yield _gauge("kvstore_connections", "Open connections of clients.", stats.connections)
    yield _counter("kvstore_connections_accepted", "Connections that were accepted.", stats.accepted)
    yield _counter("kvstore_connections_throttled", "How often a connection came to send more than its rate.",
                   stats.throttled)  # fmt: skip
    yield _counter("kvstore_connections_closed_slow", "Connections closed because they read too little.",
                   stats.closed_slow)  # fmt: skip
    requests = CounterMetricFamily("kvstore_requests", "Requests answered, by kind and outcome.",
                                   labels=("kind", "outcome"))  # fmt: skip
    for kind, outcome, count in stats.answered:
        requests.add_metric((kind, outcome), count)
    yield requests
    refused = CounterMetricFamily("kvstore_refused_input", "Connections closed for what they sent, by reason.",
                                  labels=("reason",))  # fmt: skip
    for reason, count in stats.junk:
        refused.add_metric((reason,), count)
    yield refused


def registry_of(node: Observed) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(NodeCollector(node))
    return registry


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=float(value))


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value=float(value))


def _labelled(
    name: str, text: str, labels: tuple[str, ...], values: Iterable[tuple[tuple[str, ...], float]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for label_values, value in values:
        family.add_metric(label_values, float(value))
    return family


def _histogram(name: str, text: str, meter: Meter) -> HistogramMetricFamily:
    buckets: list[tuple[str, float]] = []
    cumulated = 0
    for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), meter.counts, strict=True):
        cumulated += count
        buckets.append((bound, cumulated))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=meter.total_s)
