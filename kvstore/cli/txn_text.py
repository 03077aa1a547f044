"""A transaction written as JSON, and its result written back."""

from __future__ import annotations

import base64
import binascii
from typing import Any, Union

import click
import msgspec
from msgspec import Struct

from kvstore import model
from kvstore.cli.text import record_json

HELP = """Run one atomic transaction, given as JSON in FILE or on standard input.

If all compares hold, the operations of "success" are done, else those of "failure"; all of them or none.

\b
  {
    "compare": [{"key": "order/7", "target": "version", "relation": "==", "operand": 0}],
    "success": [
      {"add":    {"key": "stock/42", "delta": -1, "min": 0}},
      {"put":    {"key": "order/7", "value": "…"}},
      {"delete": {"start": "cart/1/", "end": "cart/10"}},
      {"range":  {"start": "order/", "end": "order0", "limit": 10}},
      {"txn":    {"compare": [], "success": [], "failure": []}}
    ],
    "failure": [{"range": {"start": "order/7"}}]
  }

\b
Keys and values are strings (UTF-8), or {"base64": "…"}. "end": null is the one key "start"; "" has no bound.
Targets:   value number version create_revision mod_revision lease count     Relations: == != < >
put:       key, value, lease, prev             delete: start, end, prev      add: key, delta, min, max
range:     start, end, limit, revision, keys_only, count_only, reverse
"""


class Base64(Struct, forbid_unknown_fields=True):
    base64: str


Text = Union[str, Base64]


class _Put(Struct, forbid_unknown_fields=True):
    key: Text
    value: Text
    lease: int = 0
    prev: bool = False


class _Delete(Struct, forbid_unknown_fields=True):
    start: Text
    end: Text | None = None
    prev: bool = False


class _Range(Struct, forbid_unknown_fields=True):
    start: Text
    end: Text | None = None
    limit: int = 0
    revision: int = 0
    keys_only: bool = False
    count_only: bool = False
    reverse: bool = False


class _Add(Struct, forbid_unknown_fields=True):
    key: Text
    delta: int
    min: int | None = None
    max: int | None = None


class _Compare(Struct, forbid_unknown_fields=True):
    key: Text
    target: str
    relation: str
    operand: int | str | Base64
    end: Text | None = None


class _Operation(Struct, forbid_unknown_fields=True):
    """Exactly one of them."""

    put: _Put | None = None
    delete: _Delete | None = None
    range: _Range | None = None
    add: _Add | None = None
    txn: _Txn | None = None


class _Txn(Struct, forbid_unknown_fields=True):
    compare: list[_Compare] = []
    success: list[_Operation] = []
    failure: list[_Operation] = []


_RELATIONS = {
    "==": model.Relation.EQUAL,
    "!=": model.Relation.NOT_EQUAL,
    "<": model.Relation.LESS,
    ">": model.Relation.GREATER,
}
_TARGETS = {target.name.lower(): target for target in model.Target}


def parse(text: bytes) -> model.Txn:
    """Raises `click.UsageError`, which says where in the text it is wrong."""
    try:
        return _txn(msgspec.json.decode(text, type=_Txn))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise click.UsageError(f"not a valid transaction: {error}") from None


def _txn(given: _Txn) -> model.Txn:
    return model.Txn(
        tuple(_compare(compare) for compare in given.compare),
        tuple(_operation(operation) for operation in given.success),
        tuple(_operation(operation) for operation in given.failure),
    )


def _operation(given: _Operation) -> model.Operation:
    named = [field for field in given.__struct_fields__ if getattr(given, field) is not None]
    if len(named) != 1:
        what = " and ".join(named) or "nothing"
        raise click.UsageError(f"an operation is one of put, delete, range, add, txn; here it is {what}")
    if given.put is not None:
        return model.Put(_bytes(given.put.key), _bytes(given.put.value), given.put.lease, given.put.prev)
    if given.delete is not None:
        return model.Delete(_bytes(given.delete.start), _end(given.delete.end), given.delete.prev)
    if given.add is not None:
        return model.Add(_bytes(given.add.key), given.add.delta, given.add.min, given.add.max)
    if given.range is not None:
        it = given.range
        return model.Range(
            _bytes(it.start), _end(it.end), it.limit, it.revision, it.keys_only, it.count_only, it.reverse
        )
    assert given.txn is not None, "one field is set"
    return _txn(given.txn)


def _compare(given: _Compare) -> model.Compare:
    target, relation = _TARGETS.get(given.target), _RELATIONS.get(given.relation)
    if target is None:
        raise click.UsageError(f"no target {given.target!r}; there are {', '.join(_TARGETS)}")
    if relation is None:
        raise click.UsageError(f"no relation {given.relation!r}; there are {' '.join(_RELATIONS)}")
    operand = given.operand if isinstance(given.operand, int) else _bytes(given.operand)
    return model.Compare(_bytes(given.key), target, relation, operand, _end(given.end))


def _bytes(given: Text) -> bytes:
    if isinstance(given, str):
        return given.encode()
    try:
        return base64.b64decode(given.base64, validate=True)
    except (ValueError, binascii.Error) as error:
        raise click.UsageError(f"{given.base64!r} is no base64: {error}") from None


def _end(given: Text | None) -> bytes | None:
    return None if given is None else _bytes(given)


# --- results ----------------------------------------------------------------------------------------------------------


def result_json(result: model.OperationResult, encoding: str) -> dict[str, Any]:
    """One operation's result, as the `txn` command prints it."""
    if isinstance(result, model.TxnResult):
        return {
            "txn": {
                "revision": result.revision,
                "succeeded": result.succeeded,
                "results": [result_json(part, encoding) for part in result.results],
            }
        }
    if isinstance(result, model.PutResult):
        prev = record_json(result.prev, encoding) if result.prev else None
        return {"put": {"revision": result.revision, "prev": prev}}
    if isinstance(result, model.DeleteResult):
        records = [record_json(record, encoding) for record in result.prev]
        return {"delete": {"revision": result.revision, "deleted": result.deleted, "prev": records}}
    if isinstance(result, model.AddResult):
        return {"add": {"revision": result.revision, "value": result.value}}
    records = [record_json(record, encoding) for record in result.records]
    return {"range": {"revision": result.revision, "count": result.count, "more": result.more, "records": records}}


def result_lines(result: model.TxnResult, encoding: str, indent: str = "  ") -> list[str]:
    """The results of a transaction's operations, a line each, for people."""
    lines = []
    for part in result.results:
        ((kind, fields),) = result_json(part, encoding).items()
        if isinstance(part, model.TxnResult):
            lines.append(f"{indent}txn: {'succeeded' if part.succeeded else 'compares failed'}")
            lines.extend(result_lines(part, encoding, indent + "  "))
        elif isinstance(part, model.RangeResult):
            lines.append(f"{indent}range: {part.count}")
            lines.extend(f"{indent}  {record['key']} = {record['value']}" for record in fields["records"])
        elif isinstance(part, model.AddResult):
            lines.append(f"{indent}add: now {part.value}")
        else:
            lines.append(f"{indent}{kind}: {part.deleted if isinstance(part, model.DeleteResult) else 'done'}")
    return lines
