"""Which records requests will ask for, so that they can be read together before the requests run.

The storage finds many keys at once for about half of what it takes to find them one by one (`Records.prefetch`). This
is a guess, and nothing depends on it: a key that is missing here is read when it is asked for, and one too many was
read in vain. So only what is cheap to see is looked at: keys that stand in a request by themselves, those of a
transaction's compares and of the branch that runs when they hold. Ranges are scans of their own; nested transactions
and the other branch are seldom.

Pure.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.model import Add, Delete, Mutation, Put, Range, Read, Txn


def named_keys(requests: Iterable[Mutation | Read]) -> list[bytes]:
    """The keys whose records the requests will ask for, in any order; one may be there twice. O(operations)."""
    keys: list[bytes] = []
    for request in requests:
        kind = type(request)
        if kind is Txn:
            keys += [compare.key for compare in request.compare if compare.end is None]  # type: ignore[union-attr]
            for operation in request.success:  # type: ignore[union-attr]
                if type(operation) is not Txn:
                    _add(keys, operation)
        else:
            _add(keys, request)
    return keys


def _add(keys: list[bytes], request: Mutation | Read) -> None:
    kind = type(request)
    if kind is Put or kind is Add:
        keys.append(request.key)  # type: ignore[union-attr]
    elif kind is Range:
        if request.end is None and not request.revision:  # type: ignore[union-attr]
            keys.append(request.start)  # type: ignore[union-attr]
    elif kind is Delete and request.end is None:  # type: ignore[union-attr]
        keys.append(request.start)  # type: ignore[union-attr]
