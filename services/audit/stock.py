"""Checks of stock: of each product, what is there and what is promised against all orders and all adjustments.

Two passes add up what there should be: that over orders (`Promised`), and that over the stock's own records. One entry
for each product is held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

from msgspec import Struct

from services.audit.findings import Checks, Difference, declare
from services.audit.view import RECORD_KEY, View
from services.audit.whole import Case
from services.orders.records import decode_adjustment, decode_product

STOCK: Final = b"stock/"
PRODUCTS: Final = b"product/"
PRODUCT_CHECKS: Final = Checks["ProductStock"]()
STOCK_KEY: Final = declare("stock_key", "Stock is kept under its three numbers and the adjustments, nothing else.")


class Promised:
    """What orders say of stock, by sku."""

    def __init__(self) -> None:
        self.reserved: Counter[str] = Counter()
        self.allocated: Counter[str] = Counter()
        self.shipped: Counter[str] = Counter()
        self.restocked: Counter[str] = Counter()

    def add(self, case: Case) -> None:
        for line in case.order.lines:
            still = line.quantity - line.cancelled - line.shipped
            if case.order.stock == "reserved":
                self.reserved[line.sku] += still
            elif case.order.stock == "allocated":
                self.allocated[line.sku] += still
        for shipment in case.shipments:
            for one in shipment.lines:
                self.shipped[one.sku] += one.quantity
        for ret in case.returns:
            for one in ret.restocked:
                self.restocked[one.sku] += one.quantity

    @property
    def skus(self) -> set[str]:
        return {*self.reserved, *self.allocated, *self.shipped, *self.restocked}


class ProductStock(Struct):
    """`adjusted` is the sum of the adjustments; the last four are what orders say."""

    sku: str
    has_record: bool = False
    on_hand: int = 0
    reserved: int = 0
    allocated: int = 0
    adjusted: int = 0
    orders_reserved: int = 0
    orders_allocated: int = 0
    shipped: int = 0
    restocked: int = 0

    def key(self, what: str) -> bytes:
        return f"stock/{self.sku}/{what}".encode()


@PRODUCT_CHECKS("stock_balance")
def stock_balance(stock: ProductStock) -> Iterator[Difference]:
    """Of each product on_hand + reserved + allocated + shipped − restocked is the sum of its adjustments."""
    found = stock.on_hand + stock.reserved + stock.allocated + stock.shipped - stock.restocked
    if found != stock.adjusted:
        yield Difference(stock.key("on_hand"), f"{stock.adjusted} in all", found)


@PRODUCT_CHECKS("stock_reserved")
def stock_reserved(stock: ProductStock) -> Iterator[Difference]:
    """What is reserved of a product is what open orders that are not paid hold of it."""
    if stock.reserved != stock.orders_reserved:
        yield Difference(stock.key("reserved"), stock.orders_reserved, stock.reserved)


@PRODUCT_CHECKS("stock_allocated")
def stock_allocated(stock: ProductStock) -> Iterator[Difference]:
    """What is allocated of a product is what paid orders hold of it that is not shipped."""
    if stock.allocated != stock.orders_allocated:
        yield Difference(stock.key("allocated"), stock.orders_allocated, stock.allocated)


@PRODUCT_CHECKS("stock_negative")
def stock_negative(stock: ProductStock) -> Iterator[Difference]:
    """No number of stock is below 0: nothing is sold that is not there."""
    for what in ("on_hand", "reserved", "allocated"):
        number = getattr(stock, what)
        if number < 0:
            yield Difference(stock.key(what), "0 at least", number)


@PRODUCT_CHECKS("stock_product")
def stock_product(stock: ProductStock) -> Iterator[Difference]:
    """What has stock, or was ordered, is a product."""
    if not stock.has_record:
        yield Difference(f"product/{stock.sku}".encode(), "a product", "none")


async def check_stock(view: View, promised: Promised) -> int:
    """Returns how many products there are."""
    stocks: dict[str, ProductStock] = {}

    def of(sku: str) -> ProductStock:
        found = stocks.get(sku)
        if found is None:
            found = stocks[sku] = ProductStock(sku)
        return found

    async for record in view.scan(PRODUCTS):
        product = view.decode(decode_product, record)
        if product is not None:
            if record.key != f"product/{product.sku}".encode():
                view.findings.add(RECORD_KEY, record.key, f"product/{product.sku}", record.key.decode())
            of(product.sku).has_record = True
    products = len(stocks)
    async for record in view.scan(STOCK):
        sku, _, what = record.key[len(STOCK) :].decode(errors="replace").partition("/")
        if what in ("on_hand", "reserved", "allocated"):
            setattr(of(sku), what, view.number(record))
        elif what.startswith("adjustment/"):
            adjustment = view.decode(decode_adjustment, record)
            if adjustment is not None:
                if adjustment.sku != sku:
                    view.findings.add(RECORD_KEY, record.key, adjustment.sku, sku)
                of(sku).adjusted += adjustment.delta
        else:
            view.findings.add(STOCK_KEY, record.key, "on_hand, reserved, allocated or an adjustment", what)
    for sku in promised.skus:
        stock = of(sku)
        stock.orders_reserved, stock.orders_allocated = promised.reserved[sku], promised.allocated[sku]
        stock.shipped, stock.restocked = promised.shipped[sku], promised.restocked[sku]
    for stock in stocks.values():
        PRODUCT_CHECKS.run(stock, view.findings)
    return products
