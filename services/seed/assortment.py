"""What a department store of the seed sells, as `assortment.toml` beside this module lists it."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import msgspec
from msgspec import Struct


class Thing(NamedTuple):
    """`low` and `high` are in whole euros."""

    noun: str
    low: int
    high: int


class Category(Struct, frozen=True, forbid_unknown_fields=True):
    """`code` begins the skus. `praise` are sentences for descriptions, without their full stops."""

    slug: str
    code: str
    makers: tuple[str, ...]
    adjectives: tuple[str, ...]
    variants: tuple[str, ...]
    praise: tuple[str, ...]
    things: tuple[Thing, ...]


class _Assortment(Struct, frozen=True, forbid_unknown_fields=True):
    categories: tuple[Category, ...]


CATEGORIES: Final = msgspec.toml.decode(
    Path(__file__).with_name("assortment.toml").read_bytes(), type=_Assortment
).categories
