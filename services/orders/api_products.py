"""Endpoints of products and of their stock."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Final

from aiohttp import web
from msgspec import Meta, Struct

from services.orders.catalogue import AdjustmentBody, Catalogue, StoredProduct, no_product
from services.orders.records import Product, Sku, encode
from services.orders.search import Currency, Price, ProductSearch, ProductsQuery
from services.web.answers import json_response
from services.web.bodies import Name, RequestBody, Text
from services.web.endpoints import Access, Call, Condition, get, post, put
from services.web.etags import check_match, etag, tagged_response
from services.web.ids import Timestamp, now_ms, timestamp
from services.web.paging import Page, PageQuery
from services.web.problems import field_problem

DELTA_MAX: Final = 1_000_000_000

# A page or two; any text in lines, or nothing. (A list reads many at a time: see `search.py` before this grows.)
Description = Annotated[
    str, Meta(max_length=2000, pattern=r"\A[^\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]*\Z")
]
CategoryOrNone = Annotated[
    str, Meta(max_length=64, pattern=r"\A([a-z0-9]+(-[a-z0-9]+)*)?\Z", examples=["kitchen"], description="Empty: none.")
]


class ProductInput(RequestBody, frozen=True):
    """`is_active` false archives a product: it cannot be ordered any more, and only staff see it."""

    name: Annotated[Name, Meta(examples=["A blue mug"])]
    price: Annotated[Price, Meta(examples=[1250])]
    currency: Currency
    description: Description = ""
    category: CategoryOrNone = ""
    is_active: bool = True


class AdjustmentInput(RequestBody, frozen=True):
    delta: Annotated[int, Meta(ge=-DELTA_MAX, le=DELTA_MAX, extra_json_schema={"not": {"const": 0}}, examples=[10])]
    reason: Annotated[Text, Meta(examples=["delivery"])]


class ProductBody(Struct, frozen=True):
    sku: str
    name: str
    price: int
    currency: str
    description: str
    category: str
    is_active: bool
    created_at: Timestamp
    updated_at: Timestamp


class StockBody(Struct, frozen=True):
    """For staff: what may be sold, what orders hold until they are paid, what paid ones hold until it is shipped."""

    sku: str
    on_hand: int
    reserved: int
    allocated: int


class AvailabilityBody(Struct, frozen=True):
    """For everyone else: how much others have reserved is not their business."""

    sku: str
    available: int


class ProductApi:
    def __init__(self, catalogue: Catalogue, search: ProductSearch) -> None:
        self._catalogue = catalogue
        self._search = search

    @get("/v1/products", {200: Page[ProductBody]})
    async def list_products(self, call: Call, query: ProductsQuery) -> web.Response:
        """List and search products

        In the order of their skus; with `q`, in the order of the words found. A page that had to look at very many
        products may hold fewer than `limit`, or none, and yet have a `next_cursor`: go on with it.
        """
        page = await self._search.page(query, is_staff=_is_staff(call))
        return json_response(
            encode(Page([product_body(product) for product in page.data], page.has_more, page.next_cursor))
        )

    @put("/v1/products/{sku}", {200: ProductBody, 201: ProductBody}, access=Access.STAFF, condition=Condition.OFFERED)
    async def put_product(self, call: Call, sku: Sku, body: ProductInput) -> web.Response:
        """Create or replace a product

        What is left out becomes its default. Products are archived (`is_active` false), not deleted: orders name them.
        """
        check = partial(check_match, call.request)
        stored, created = await self._catalogue.put(product_of(sku, body, now_ms()), check)
        response = json_response(encode(product_body(stored.product)), 201 if created else 200)
        response.headers["ETag"] = etag(stored.revision)
        if created:
            response.headers["Location"] = f"/v1/products/{sku}"
        return response

    @get("/v1/products/{sku}", {200: ProductBody, 304: None})
    async def read_product(self, call: Call, sku: Sku) -> web.Response:
        """Read a product

        One that is archived is there for staff only.
        """
        stored = await _visible(self._catalogue, call, sku)
        return tagged_response(call.request, encode(product_body(stored.product)), stored.revision)


class StockApi:
    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    @post(
        "/v1/products/{sku}/stock",
        {201: AdjustmentBody},
        access=Access.STAFF,
        idempotent=True,
        problems=("insufficient_stock", "stock_too_large"),
    )
    async def adjust_stock(self, call: Call, sku: Sku, body: AdjustmentInput) -> web.Response:
        """Adjust what is on hand, with a reason"""
        if body.delta == 0:
            raise field_problem("/delta", "invalid_value", "An adjustment by 0 adjusts nothing")
        return await self._catalogue.adjust(
            call.request, call.idempotency, sku, body.delta, body.reason, call.caller.user_id
        )

    @get("/v1/products/{sku}/stock", {200: (StockBody, AvailabilityBody), 304: None})
    async def read_stock(self, call: Call, sku: Sku) -> web.Response:
        """Read how much there is

        What is available; for staff also how much of it placed orders hold, and so with another ETag.
        """
        is_staff = _is_staff(call)
        level = await self._catalogue.stock(sku)
        if level is None or not (level.is_active or is_staff):
            raise no_product(sku)
        if is_staff:
            body = encode(StockBody(sku, level.on_hand, level.reserved, level.allocated))
            return tagged_response(call.request, body, *level.revisions)
        return tagged_response(call.request, encode(AvailabilityBody(sku, level.on_hand)), level.revisions[0])

    @get("/v1/products/{sku}/stock/adjustments", {200: Page[AdjustmentBody]}, access=Access.STAFF)
    async def list_adjustments(self, call: Call, sku: Sku, query: PageQuery) -> web.Response:
        """List how and why stock was adjusted

        Newest first. What orders take and give back is not in it.
        """
        page = await self._catalogue.adjustments(sku, query)
        if page is None:
            raise no_product(sku)
        return json_response(encode(page))


def product_of(sku: str, given: ProductInput, at_ms: int) -> Product:
    """The record of a product that is created at this moment."""
    return Product(
        sku, given.name, given.price, given.currency, at_ms, given.description, given.category, given.is_active, at_ms
    )


def product_body(product: Product) -> ProductBody:
    return ProductBody(
        product.sku,
        product.name,
        product.price,
        product.currency,
        product.description,
        product.category,
        product.is_active,
        timestamp(product.created_ms or product.updated_ms),
        timestamp(product.updated_ms),
    )


async def _visible(catalogue: Catalogue, call: Call, sku: str) -> StoredProduct:
    """The product, if who asks may see it. Raises `Problem` `not_found`."""
    stored = await catalogue.read(sku)
    if stored is None or not (stored.product.is_active or _is_staff(call)):
        raise no_product(sku)
    return stored


def _is_staff(call: Call) -> bool:
    return call.caller_if_any is not None and call.caller_if_any.is_staff
