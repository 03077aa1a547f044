"""The order service over HTTP: products, stock, carts, orders, payments, shipments, returns. `/docs` shows every
endpoint.

An order for a product that does not exist is 422 with a pointer to its line, since the body is at fault and not the
path; a path that names an unknown product is 404.
"""

from __future__ import annotations

from typing import Final

from aiohttp import web
from msgspec import Struct

import kvstore
from services.orders.api_carts import CartApi
from services.orders.api_fulfilment import FulfilmentEndpoints
from services.orders.api_orders import OrderEndpoints
from services.orders.api_payments import PaymentEndpoints, WebhookEndpoints
from services.orders.api_products import ProductApi, StockApi
from services.orders.api_work import WorkEndpoints
from services.orders.book import OrderBook
from services.orders.carts import Carts
from services.orders.catalogue import Catalogue
from services.orders.feed import EventFeed
from services.orders.placing import Placing
from services.orders.search import ProductSearch
from services.payments.loading import OpenProvider, open_sandbox
from services.web.app import new_app
from services.web.endpoints import Api
from services.web.idempotency import IdempotencyKeys
from services.web.limits import Limit
from services.web.logs import AccessLog
from services.web.tokens import SigningKeys, Tokens

PAY_WITHIN_S: Final = 30 * 60.0  # long enough to find the card, and for a bank's page


class Settings(Struct, frozen=True, kw_only=True):
    """What a deployment decides. `provider` is made once for each process, over its HTTP client."""

    provider: OpenProvider = open_sandbox
    pay_within_s: float = PAY_WITHIN_S


def create_app(
    store: kvstore.Client,
    access_log: AccessLog | None = None,
    limit: Limit | None = None,
    settings: Settings | None = None,
) -> web.Application:
    settings = settings or Settings()
    catalogue, carts, book = Catalogue(store), Carts(store), OrderBook(store)
    placing = Placing(store, catalogue, carts, int(settings.pay_within_s * 1000))
    tokens = Tokens(SigningKeys(store))
    api = Api(
        "Order service",
        "Products, stock, carts, orders, payments, shipments and returns.",
        tokens,
        IdempotencyKeys(store),
        limit,
    )
    api.add(ProductApi(catalogue, ProductSearch(store)), tag="Products")
    api.add(StockApi(catalogue), tag="Stock")
    api.add(CartApi(store, carts), tag="Carts")
    api.add(OrderEndpoints(store, placing, book, EventFeed(store, tokens)), tag="Orders")
    api.add(PaymentEndpoints(book), tag="Payments and refunds")
    api.add(FulfilmentEndpoints(book), tag="Shipments and returns")
    webhooks = WebhookEndpoints(store, settings.provider)
    api.add(webhooks, tag="Webhooks")
    api.add(WorkEndpoints(store), tag="Work of staff")
    app = new_app(store, api, access_log)
    app.cleanup_ctx.append(webhooks.running)
    return app
