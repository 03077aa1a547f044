"""What a change of a product writes: its record, and its places in the indexes, in one transaction.

A product stands in `product-category/` (if it has a category) and, for every word of its sku and its name, in
`product-word/`. Whoever writes a product compares the revision of the record that it read, and writes
`product_operations`: what the change adds to the indexes is put, what it takes away is deleted. So an index is never
behind the records, whoever writes at the same time, and there is no other way to write a product.

Words are runs of letters and digits, folded: without case and accents ("Café" is found by "cafe"), and no longer than
`WORD_CHARS_MAX`. Scripts that put no blanks between words are found by the beginnings of their runs only.

Whoever changes how words are made must write all products anew: `index_keys` of the record that was is what tells
which keys are there.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

import kvstore
from services.orders.records import Product, encode, product_key

# A sku has 32 words at most, a name of plain words some 30. With as many removed, 129 operations of 1,024.
WORDS_MAX: Final = 64
WORD_CHARS_MAX: Final = 32  # 128 bytes of a key; no longer word has to be told from another by its end

CATEGORIES: Final = b"product-category/"
WORDS: Final = b"product-word/"
_WORD: Final = re.compile(r"[^\W_]+")


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text, folded, each once, in the order of the text."""
    decomposed = unicodedata.normalize("NFKD", text)
    plain = "".join(character for character in decomposed if not unicodedata.combining(character)).casefold()
    return tuple(dict.fromkeys(word[:WORD_CHARS_MAX] for word in _WORD.findall(plain)))


def product_words(product: Product) -> tuple[str, ...]:
    """The words by which a product is found."""
    return words_of(f"{product.sku} {product.name}")[:WORDS_MAX]


def category_of(category: str) -> bytes:
    """The prefix of a category's index."""
    return b"%b%b/" % (CATEGORIES, category.encode())


def words_from(prefix: str) -> bytes:
    """The prefix of the index of all words that begin so."""
    return WORDS + prefix.encode()


def index_keys(product: Product) -> frozenset[bytes]:
    sku = product.sku.encode()
    keys = {b"%b%b/%b" % (WORDS, word.encode(), sku) for word in product_words(product)}
    if product.category:
        keys.add(category_of(product.category) + sku)
    return frozenset(keys)


def product_operations(product: Product, before: Product | None) -> list[kvstore.Operation]:
    """The writes that make a product of what was there before. Its `created_ms` must not be 0."""
    assert product.created_ms > 0
    keys = index_keys(product)
    held = index_keys(before) if before is not None and before.created_ms > 0 else frozenset()
    return [
        kvstore.Put(product_key(product.sku), encode(product)),
        *(kvstore.Put(key, b"") for key in sorted(keys - held)),
        *(kvstore.Delete(key) for key in sorted(held - keys)),
    ]
