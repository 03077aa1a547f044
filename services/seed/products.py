"""Products of a seed, with the stock that they begin with. The same seed makes the same products; the n-th does not
depend on how many there are."""

from __future__ import annotations

import functools
import math
import random
from typing import Any, Final

import msgspec
from msgspec import Struct

from services.orders.api_products import ProductInput
from services.seed.assortment import CATEGORIES, Category, Thing

_CURRENCY: Final = "EUR"
_ARCHIVED: Final = 0.02  # not sold any more
_SOLD_OUT: Final = 0.05
_DAMAGED: Final = 0.15
_COUNTED: Final = 0.2
# Of Crockford's base 32: nothing that is read for something else.
_TAG: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


class SeedProduct(Struct, frozen=True):
    """`stock`: adjustments (delta, reason), in their order; the level never falls below 0 on the way."""

    sku: str
    product: ProductInput
    stock: tuple[tuple[int, str], ...]


def tag_of(seed: int) -> str:
    """Two characters that tell the products and people of one seed from those of others, as a rule."""
    chance = random.Random(f"tag {seed}")
    return "".join(chance.choices(_TAG, k=2))


def product(seed: int, number: int) -> SeedProduct:
    """The `number`-th product of a seed, from 1."""
    chance = random.Random(f"product {seed} {number}")
    turn, which = divmod(number - 1, len(CATEGORIES))
    category = CATEGORIES[which]
    order = _order(seed, which)
    thing, maker, adjective, variant = _combination(category, order[turn % len(order)])
    name = f"{maker} {adjective} {thing.noun}, {variant}"
    fields = {
        "name": name,
        "price": _price(chance, thing),
        "currency": _CURRENCY,
        "description": _description(chance, category, thing, maker),
        "category": category.slug,
        "is_active": chance.random() >= _ARCHIVED,
    }
    # Checked as a request's body would be.
    return SeedProduct(
        f"{category.code}-{tag_of(seed)}-{number:05d}", msgspec.convert(fields, ProductInput), _stock(chance)
    )


@functools.cache
def _order(seed: int, which: int) -> tuple[int, ...]:
    """In which order the combinations of a category come: each once, some 900, before they come again."""
    order = list(range(math.prod(map(len, _parts(CATEGORIES[which])))))
    random.Random(f"order {seed} {which}").shuffle(order)
    return tuple(order)


def _combination(category: Category, at: int) -> tuple[Thing, str, str, str]:
    chosen = []
    for part in _parts(category):
        at, index = divmod(at, len(part))
        chosen.append(part[index])
    thing, maker, adjective, variant = chosen
    return thing, maker, adjective, variant


def _parts(category: Category) -> tuple[tuple[Any, ...], ...]:
    return category.things, category.makers, category.adjectives, category.variants


def _price(chance: random.Random, thing: Thing) -> int:
    """In cents, and as shops like them; cheap ones are more frequent."""
    low, high = math.log(thing.low), math.log(thing.high)
    euros = round(math.exp(chance.triangular(low, high, low + (high - low) / 3)))
    return euros * 100 - chance.choice((1, 5, 10, 0, 50))


def _description(chance: random.Random, category: Category, thing: Thing, maker: str) -> str:
    first, second = chance.sample(category.praise, 2)
    opening = chance.choice(
        (
            f"{thing.noun} by {maker}, made to last.",
            f"From {maker}, who have made this for many years.",
            "One of the things that you will not want to give back.",
        )
    )
    return f"{opening} {first}. {second}."


def _stock(chance: random.Random) -> tuple[tuple[int, str], ...]:
    if chance.random() < _SOLD_OUT:
        return ()
    first = 1 + int(chance.lognormvariate(3.2, 1.0))  # some 25, and now and then several hundred
    steps = [(first, "opening stock")]
    if chance.random() < 0.6:
        order = chance.randint(10_000, 99_999)
        steps.append((1 + int(chance.lognormvariate(2.8, 0.8)), f"delivery, purchase order PO-{order}"))
    if chance.random() < _DAMAGED:
        steps.append((-chance.randint(1, min(3, first)), "damaged in storage"))
    level = sum(delta for delta, _ in steps)
    if chance.random() < _COUNTED and level > 2:
        steps.append((chance.choice((-2, -1, 1, 2)), "stock count"))
    return tuple(steps)
