"""What a request may be, whatever the state: sizes, counts, shapes. Pure.

A door calls `check_mutation` or `check_read` before a request goes any further, so nothing that fails here ever
reaches a log entry. What depends on the state (a missing lease, a refused Add) is not judged here but in `apply`.
What is no request at all (a str among the operations) is its maker's mistake, and no decoder lets it in: `TypeError`.
"""

from __future__ import annotations

import ipaddress
import re

from kvstore import model
from kvstore.errors import Refused
from kvstore.model import (
    Add,
    Compact,
    Compare,
    Delete,
    DescribeLease,
    GrantLease,
    KeepLease,
    ListLeases,
    Put,
    Range,
    RevokeLease,
    Target,
    Txn,
)

# What a node is called, and the id of its log: they go into file names, engine ids and log lines.
_NODE_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
# A name of the DNS, of at most 253 characters; one that ends in a number would be taken for an IPv4 address.
_HOST_NAME = re.compile(r"(?=.{1,253}\Z)(?:[A-Za-z0-9_-]{1,63}\.)*(?![0-9]+\.?\Z)[A-Za-z0-9_-]{1,63}\.?")
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]{1,45}(?:%[A-Za-z0-9._-]{1,15})?)\]|([^\[\]:]{1,253})):([0-9]{1,5})")


def check_mutation(request: model.Mutation, size_bytes: int) -> None:
    """Raises `Refused`, with the limit in the message. `size_bytes` is the encoded request's size."""
    if size_bytes > model.REQUEST_BYTES_MAX:
        raise Refused(
            f"request of {size_bytes} bytes is over the limit of {model.REQUEST_BYTES_MAX}; split it",
            code="request_too_large",
        )
    kind = type(request)
    if kind is Txn:
        _check_txn(request, (), 1)  # type: ignore[arg-type]
    elif kind in (Put, Delete, Range, Add):
        _check_operation(request, ())  # type: ignore[arg-type]
    elif kind is Compact and request.revision < 1:  # type: ignore[union-attr]
        raise Refused("revision must be at least 1", code="invalid_request")
    elif kind is GrantLease:
        _check_grant(request)  # type: ignore[arg-type]
    elif kind is KeepLease or kind is RevokeLease:
        _check_lease(request.lease, 1)  # type: ignore[union-attr]


def check_read(request: model.Read, size_bytes: int) -> None:
    """Raises `Refused`; also where a transaction holds anything but ranges."""
    if isinstance(request, DescribeLease):
        _check_lease(request.lease, 1)
        return
    if isinstance(request, ListLeases):
        _check_lease(request.after, 0)
        if request.limit < 0:
            raise Refused("limit must not be negative", code="invalid_request")
        return
    if isinstance(request, model.Digest):
        _check_range(request.start, request.end, ())
        if not 0 < request.limit <= model.DIGEST_RECORDS_MAX or not 0 < request.revision <= model.INT64_MAX:
            raise Refused(
                f"a digest is of a revision, and of 1 to {model.DIGEST_RECORDS_MAX} records", code="invalid_request"
            )
        if not 0 < request.limit_bytes <= model.DIGEST_BYTES_MAX:
            raise Refused(f"a page of a digest has 1 to {model.DIGEST_BYTES_MAX} bytes", code="invalid_request")
        return
    check_mutation(request, size_bytes)
    if isinstance(request, Txn) and not is_read_only(request):
        raise Refused("a read may hold only ranges; send a transaction that writes as a write", code="invalid_request")


def check_watch(start: bytes, end: bytes | None, from_revision: int, window_bytes: int) -> None:
    """Raises `Refused`; also where there is nothing to watch."""
    _check_range(start, end, ())
    if end and end == start:
        raise Refused("a watch's range is empty: its end is not above its start", code="invalid_range")
    if not 0 <= from_revision <= model.INT64_MAX:
        raise Refused(f"a revision is a number from 0 to 2^63 - 1, not {from_revision}", code="invalid_request")
    if not model.WATCH_WINDOW_BYTES_MIN <= window_bytes <= model.WATCH_WINDOW_BYTES_MAX:
        raise Refused(
            f"a watch's window is from {model.WATCH_WINDOW_BYTES_MIN} to {model.WATCH_WINDOW_BYTES_MAX} bytes, "
            f"not {window_bytes}",
            code="invalid_request",
        )


def is_node_name(name: str) -> bool:
    """1 to 64 of letters, digits, `.`, `_`, `-`; and a directory's own name or its parent's is none."""
    return _NODE_NAME.fullmatch(name) is not None and name not in (".", "..")


def check_member(member: model.Member) -> None:
    """What is to be recorded for the whole cluster: only what the others can use. A member without an address for
    clients is one that serves none. Raises `Refused`."""
    for what, name in (("name", member.name), ("node id", member.node_id)):
        if not is_node_name(name):
            raise Refused(
                f"{_short(name)} is no {what}: use 1 to 64 of letters, digits, '.', '_', '-'", code="invalid_request"
            )
    check_address(member.peer_address)
    if member.client_address:
        check_address(member.client_address)


def check_address(address: str) -> None:
    """An address that others are told to connect to: a host that is one, and a port. Raises `Refused`."""
    parts = _ADDRESS.fullmatch(address)
    if parts is None:
        raise _no_address(address, "write host:port, and an IPv6 host in brackets")
    in_brackets, bare, port = parts.groups()
    try:
        ip = ipaddress.ip_address(in_brackets or bare)
    except ValueError:
        ip = None
    if ip is None and (in_brackets or not _HOST_NAME.fullmatch(bare)):
        raise _no_address(address, f"there is no host {in_brackets or bare}")
    if ip is not None and ip.is_unspecified:
        raise _no_address(address, "it stands for every address of its machine; write the one that the others reach")
    if not 0 < int(port) <= 65535:
        raise _no_address(address, "a port is a number from 1 to 65535")


def _no_address(address: str, why: str) -> Refused:
    return Refused(f"{_short(address)} is nothing that others can connect to: {why}", code="invalid_request")


def _short(text: str) -> str:
    """As it is written in a message, however long it is."""
    return repr(text if len(text) <= 100 else f"{text[:100]}…")


def _check_grant(grant: GrantLease) -> None:
    _check_lease(grant.lease, 0)
    if not model.LEASE_TTL_MS_MIN <= grant.ttl_ms <= model.LEASE_TTL_MS_MAX:
        raise Refused(
            f"a lease lives at least {model.LEASE_TTL_MS_MIN} ms and at most {model.LEASE_TTL_MS_MAX} ms, "
            f"not {grant.ttl_ms}",
            code="invalid_request",
        )


def _check_lease(lease: int, least: int, path: tuple[int, ...] = ()) -> None:
    if not least <= lease <= model.LEASE_ID_MAX:
        raise Refused(
            f"the id of a lease is a number from {least} to {model.LEASE_ID_MAX}, not {lease}",
            code="invalid_request",
            operation=path,
        )


def is_read_only(txn: Txn) -> bool:
    """True if no branch writes. Raises `Refused` where transactions are nested too deep, however deep that is."""
    return _is_read_only(txn, (), 1)


def _is_read_only(txn: Txn, path: tuple[int, ...], depth: int) -> bool:
    _check_depth(path, depth)
    for branch in (txn.success, txn.failure):
        for position, operation in enumerate(branch):
            if isinstance(operation, Txn):
                if not _is_read_only(operation, (*path, position), depth + 1):
                    return False
            elif not isinstance(operation, Range):
                return False
    return True


def _check_depth(path: tuple[int, ...], depth: int) -> None:
    if depth > model.TXN_DEPTH_MAX:
        raise Refused(
            f"transactions nested deeper than {model.TXN_DEPTH_MAX}", code="too_many_operations", operation=path
        )


def _check_txn(txn: Txn, path: tuple[int, ...], depth: int) -> int:
    _check_depth(path, depth)
    for compare in txn.compare:
        _check_compare(compare, path)
    count = len(txn.compare) + len(txn.success) + len(txn.failure)
    position = 0
    for branch in (txn.success, txn.failure):
        for position, operation in enumerate(branch):
            if _is_plain(operation):
                continue
            where = (*path, position)
            if type(operation) is Txn:
                count += _check_txn(operation, where, depth + 1)
            else:
                _check_operation(operation, where)
    if count > model.TXN_OPERATIONS_MAX:
        raise Refused(
            f"{count} operations and compares in one transaction; the limit is {model.TXN_OPERATIONS_MAX}",
            code="too_many_operations",
            operation=path,
        )
    return count


def _is_plain(operation: model.Operation) -> bool:
    """True only for what `_check_operation` finds nothing wrong with: the usual operations, told at a fraction of its
    cost. Every write of every client is checked twice, by the client and by the node."""
    kind = type(operation)
    if kind is Put:
        key, value = operation.key, operation.value  # type: ignore[union-attr]
        return (
            type(key) is bytes
            and 0 < len(key) <= model.KEY_BYTES_MAX
            and type(value) is bytes
            and len(value) <= model.VALUE_BYTES_MAX
            and 0 <= operation.lease <= model.LEASE_ID_MAX  # type: ignore[union-attr]
        )
    if kind is Add:
        key, least = operation.key, operation.min  # type: ignore[union-attr]
        return (
            type(key) is bytes
            and 0 < len(key) <= model.KEY_BYTES_MAX
            and model.INT64_MIN <= operation.delta <= model.INT64_MAX  # type: ignore[union-attr]
            and (least is None or least == 0)
            and operation.max is None  # type: ignore[union-attr]
        )
    if kind is Range:
        key = operation.start  # type: ignore[union-attr]
        return (
            operation.end is None  # type: ignore[union-attr]
            and type(key) is bytes
            and 0 < len(key) <= model.KEY_BYTES_MAX
            and operation.limit >= 0  # type: ignore[union-attr]
            and operation.revision >= 0  # type: ignore[union-attr]
        )
    return False


def _check_operation(operation: Put | Delete | Range | Add | Txn, path: tuple[int, ...]) -> None:
    kind = type(operation)
    if kind is Put:
        _check_key(operation.key, path)  # type: ignore[union-attr]
        _check_bytes("value", operation.value)  # type: ignore[union-attr]
        if operation.lease:  # type: ignore[union-attr]
            _check_lease(operation.lease, 0, path)  # type: ignore[union-attr]
        size = len(operation.value)  # type: ignore[union-attr]
        if size > model.VALUE_BYTES_MAX:
            raise Refused(
                f"value of {size} bytes is over the limit of {model.VALUE_BYTES_MAX}",
                code="value_too_large",
                operation=path,
            )
    elif kind is Add:
        _check_add(operation, path)  # type: ignore[arg-type]
    else:
        if not isinstance(operation, (Delete, Range)):
            raise TypeError(f"an operation is a Put, Delete, Range, Add or Txn, not {kind.__name__}{_at(path)}")
        _check_range(operation.start, operation.end, path)
        if isinstance(operation, Range) and (operation.limit < 0 or operation.revision < 0):
            raise Refused("limit and revision must not be negative", code="invalid_range", operation=path)


def _check_add(add: Add, path: tuple[int, ...]) -> None:
    _check_key(add.key, path)
    for name, number in (("delta", add.delta), ("min", add.min), ("max", add.max)):
        if number is not None and not model.INT64_MIN <= number <= model.INT64_MAX:
            raise Refused(f"{name} of Add is no signed 64-bit number", code="invalid_request", operation=path)
    if add.min is not None and add.max is not None and add.min > add.max:
        raise Refused("min of Add is above its max", code="invalid_request", operation=path)


def _check_compare(compare: Compare, path: tuple[int, ...]) -> None:
    if type(compare) is not Compare:
        raise TypeError(f"a compare is a Compare, not {type(compare).__name__}{_at(path)}")
    _check_range(compare.key, compare.end, path)
    if isinstance(compare.operand, bytes) is not (compare.target is Target.VALUE):
        raise Refused("a compare on VALUE takes bytes, any other a number", code="invalid_request", operation=path)
    if isinstance(compare.operand, int) and not model.INT64_MIN <= compare.operand <= model.INT64_MAX:
        raise Refused("operand of a compare is no signed 64-bit number", code="invalid_request", operation=path)


def _at(path: tuple[int, ...]) -> str:
    return f" (operation {'.'.join(map(str, path))})" if path else ""


def _check_bytes(name: str, value: object) -> None:
    if not isinstance(value, bytes):
        raise TypeError(f"{name} must be bytes, not {type(value).__name__}")


def _check_key(key: bytes, path: tuple[int, ...]) -> None:
    _check_bytes("key", key)
    if not key:
        raise Refused("a key must not be empty", code="key_empty", operation=path)
    if len(key) > model.KEY_BYTES_MAX:
        raise Refused(
            f"key of {len(key)} bytes is over the limit of {model.KEY_BYTES_MAX}", code="key_too_large", operation=path
        )


def _check_range(start: bytes, end: bytes | None, path: tuple[int, ...]) -> None:
    if end is None:
        _check_key(start, path)
        return
    for key in (start, end):
        _check_bytes("key", key)
        if len(key) > model.KEY_BYTES_MAX:
            raise Refused(
                f"key of {len(key)} bytes is over the limit of {model.KEY_BYTES_MAX}",
                code="key_too_large",
                operation=path,
            )
    if end and end < start:
        raise Refused("a range's end is below its start", code="invalid_range", operation=path)
