"""What a request may be: mistakes of the caller's have a text, however deep or odd what was given is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

import kvstore
from kvstore import Client, Refused, limits, model
from kvstore.model import Add, Compare, Delete, Put, Range, Relation, Target, Txn
from tests.fake_server import FakeCluster


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    async with FakeCluster(1) as cluster:
        yield cluster


@pytest.fixture
async def kv(cluster: FakeCluster) -> AsyncIterator[Client]:
    async with kvstore.connect(cluster.endpoints) as kv:
        yield kv


def nested(depth: int, innermost: Put | Range) -> Txn:
    txn = Txn((), (innermost,), ())
    for _ in range(depth - 1):
        txn = Txn((), (txn,), ())
    return txn


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"success": ["x"]}, r"an operation is a Put, .* not str \(operation 0\)"),
        ({"success": "x"}, r"an operation is a Put, .* not str \(operation 0\)"),
        ({"failure": [Put(b"a", b""), Txn((), (None,), ())]}, r"not NoneType \(operation 1\.0\)"),  # type: ignore[arg-type]
        ({"success": [Compare(b"a", Target.VERSION, Relation.EQUAL, 0)]}, "not Compare"),
        ({"compare": ["x"], "success": [Put(b"a", b"")]}, "a compare is a Compare, not str"),
        ({"compare": ["x"], "success": [Range(b"a")]}, "a compare is a Compare, not str"),
        ({"success": [Put("a", b"")]}, "key must be bytes, not str"),  # type: ignore[arg-type]
        ({"success": [Put(b"a", "1")]}, "value must be bytes, not str"),  # type: ignore[arg-type]
        ({"success": [Delete(b"a", "b")]}, "key must be bytes, not str"),  # type: ignore[arg-type]
    ],
)
async def test_what_is_no_operation_is_a_type_error_with_a_text(
    kv: Client, cluster: FakeCluster, arguments: dict[str, Any], text: str
) -> None:
    with pytest.raises(TypeError, match=text):
        await kv.txn(**arguments)
    assert not cluster.nodes[0].writes
    assert not cluster.nodes[0].reads


@pytest.mark.parametrize("innermost", [Put(b"a", b""), Range(b"a")])
@pytest.mark.parametrize("depth", [8, 9, 900, 2000, 20_000])
async def test_nesting_has_a_limit_whatever_the_stack(kv: Client, depth: int, innermost: Put | Range) -> None:
    txn = nested(depth - 1, innermost)  # `kv.txn` puts one around it
    if depth == 8:
        await kv.txn(success=[txn])
        return
    with pytest.raises(Refused) as caught:
        await kv.txn(success=[txn])
    assert caught.value.code == "too_many_operations"
    with pytest.raises(Refused):
        await kv.txn(success=[Put(b"b", b""), txn])
    with pytest.raises(Refused):
        limits.is_read_only(nested(depth, innermost))


HUGE = b"k" * (model.KEY_BYTES_MAX + 1)


@pytest.mark.parametrize(
    ("operation", "code"),
    [
        (Put(b"k" * model.KEY_BYTES_MAX, b"v" * model.VALUE_BYTES_MAX, lease=model.LEASE_ID_MAX), None),
        (Put(b"", b""), "key_empty"),
        (Put(HUGE, b""), "key_too_large"),
        (Put(b"k", b"v" * (model.VALUE_BYTES_MAX + 1)), "value_too_large"),
        (Put(b"k", b"", lease=-1), "invalid_request"),
        (Put(b"k", b"", lease=model.LEASE_ID_MAX + 1), "invalid_request"),
        (Add(b"k", model.INT64_MAX, min=0), None),
        (Add(b"k", model.INT64_MIN), None),
        (Add(b"", 1), "key_empty"),
        (Add(HUGE, 1), "key_too_large"),
        (Add(b"k", model.INT64_MAX + 1), "invalid_request"),
        (Add(b"k", model.INT64_MIN - 1), "invalid_request"),
        (Add(b"k", 1, min=model.INT64_MIN - 1), "invalid_request"),
        (Add(b"k", 1, max=model.INT64_MAX + 1), "invalid_request"),
        (Add(b"k", 1, min=0, max=-1), "invalid_request"),
        (Range(b"k"), None),
        (Range(b""), "key_empty"),
        (Range(HUGE), "key_too_large"),
        (Range(b"k", limit=-1), "invalid_range"),
        (Range(b"k", revision=-1), "invalid_range"),
        (Range(b"b", b"a"), "invalid_range"),
        (Delete(b""), "key_empty"),
    ],
)
def test_an_operation_has_the_same_limits_alone_and_in_a_transaction(operation: Any, code: str | None) -> None:
    """A transaction's are looked at in a quicker way first."""
    for request in (
        operation,
        Txn(success=(operation,)),
        Txn(failure=(operation,)),
        Txn(success=(Txn(success=(operation,)),)),
    ):
        if code is None:
            limits.check_mutation(request, 1)
            continue
        with pytest.raises(Refused) as caught:
            limits.check_mutation(request, 1)
        assert caught.value.code == code
