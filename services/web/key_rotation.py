"""Rotating the key that access tokens are signed with (`python -m services rotate-keys`).

The new key and its being the current one are one transaction, compared with the current one as it was read: of two
rotations at once one wins. Keys before it stay, under a lease, for as long as any process may sign with them
(`CURRENT_AGE_S`) and tokens so signed are good; then they go by themselves, and processes that verify notice within
`CURRENT_AGE_S` more. With `drop_old` they go at once, for a key that somebody else may have: every access token is
refused within `TOKEN_TTL_S` at the latest (processes remember what they verified), and clients refresh their sessions,
which are not signed and go on.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

import kvstore
from services.web.ids import now_ms
from services.web.tokens import ALGORITHM, CURRENT_AGE_S, CURRENT_KEY, KEY_PREFIX, TOKEN_GONE_AFTER_S, SigningKey

OLD_KEPT_S: Final = 2 * CURRENT_AGE_S + TOKEN_GONE_AFTER_S


Also = Callable[[kvstore.Transaction, str], Awaitable[None]]


async def rotate(store: kvstore.Client, *, drop_old: bool = False, also: Also | None = None) -> str:
    """Returns the new key's id. `also` is given the transaction and that id, for what goes with it: an entry in an
    audit log. Raises `kvstore.Refused` (conflict) if others rotate again and again."""
    key = SigningKey(secrets.token_hex(8), ALGORITHM, secrets.token_bytes(32), now_ms())
    old_lease = 0 if drop_old else (await store.grant_lease(OLD_KEPT_S)).lease

    async def body(txn: kvstore.Transaction) -> None:
        await txn.get(CURRENT_KEY)
        for record in (await txn.range(prefix=KEY_PREFIX)).records:
            if drop_old:
                txn.delete(record.key)
            elif not record.lease:  # the others are on their way out already
                txn.put(record.key, record.value, lease=old_lease)
        txn.put(KEY_PREFIX + key.kid.encode(), msgspec.json.encode(key))
        txn.put(CURRENT_KEY, key.kid.encode())
        if also is not None:
            await also(txn, key.kid)

    await store.run_transaction(body)
    return key.kid
