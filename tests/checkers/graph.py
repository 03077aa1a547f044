"""A directed graph with named edges, and its shortest cycle."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

# A shortest cycle is searched from so many nodes of a tangle: each search costs the tangle's edges, and a cycle that
# passes through none of so many is a luxury.
STARTS_MAX = 300


class Graph:
    """Nodes are 0 … n-1. Of several edges from one node to another the first one stands. The last `helpers` nodes only
    connect others: a way through them is no longer for them."""

    def __init__(self, nodes: int, helpers: int = 0) -> None:
        self.edges: list[dict[int, str]] = [{} for _ in range(nodes + helpers)]
        self._nodes = nodes

    def add(self, source: int, target: int, name: str) -> None:
        if source != target:
            self.edges[source].setdefault(target, name)

    def cycle(self) -> list[tuple[int, str]]:
        """A shortest cycle as (node, name of the edge that leaves it), helpers included; empty if there is none."""
        best: list[tuple[int, str]] = []
        best_length = len(self.edges) + 1
        for tangle in self._tangles():
            inside = set(tangle)
            for start in [node for node in tangle if node < self._nodes][:STARTS_MAX]:
                found = self._round(start, inside, best_length)
                if found:
                    best, best_length = found, sum(1 for node, _ in found if node < self._nodes)
        return best

    def _round(self, start: int, inside: set[int], shorter_than: int) -> list[tuple[int, str]]:
        """The shortest way from `start` back to it: breadth first, where a step to a helper costs nothing. Empty if it
        is not shorter than asked."""
        came_from: dict[int, int] = {}
        settled: set[int] = set()
        length = {start: 0}
        queue = deque([start])
        while queue:
            node = queue.popleft()
            if node in settled:
                continue
            settled.add(node)
            if length[node] + 1 >= shorter_than:
                return []
            for target in self.edges[node]:
                if target == start:
                    way = [node]
                    while way[-1] != start:
                        way.append(came_from[way[-1]])
                    way.reverse()
                    return [(at, self.edges[at][to]) for at, to in zip(way, [*way[1:], start], strict=True)]
                cost = 1 if target < self._nodes else 0
                if target in inside and length[node] + cost < length.get(target, len(self.edges)):
                    length[target] = length[node] + cost
                    came_from[target] = node
                    if cost:
                        queue.append(target)
                    else:
                        queue.appendleft(target)
        raise AssertionError("every node of a tangle is on a cycle")

    def _tangles(self) -> Iterable[list[int]]:
        """Strongly connected components of more than one node: Tarjan's algorithm (1972), without recursion."""
        index: dict[int, int] = {}
        low: dict[int, int] = {}
        on_stack: set[int] = set()
        stack: list[int] = []
        for root in range(len(self.edges)):
            if root in index:
                continue
            index[root] = low[root] = len(index)
            stack.append(root)
            on_stack.add(root)
            work = [(root, iter(self.edges[root]))]
            while work:
                node, targets = work[-1]
                for target in targets:
                    if target not in index:
                        index[target] = low[target] = len(index)
                        stack.append(target)
                        on_stack.add(target)
                        work.append((target, iter(self.edges[target])))
                        break
                    if target in on_stack:
                        low[node] = min(low[node], index[target])
                else:
                    work.pop()
                    if work:
                        parent = work[-1][0]
                        low[parent] = min(low[parent], low[node])
                    if low[node] == index[node]:
                        component: list[int] = []
                        while not component or component[-1] != node:
                            component.append(stack.pop())
                            on_stack.discard(component[-1])
                        if len(component) > 1:
                            yield sorted(component)
