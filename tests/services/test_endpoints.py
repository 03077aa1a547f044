"""Endpoints by declaration: what is checked before a handler runs, and the document that comes of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer, make_mocked_request
from msgspec import Meta, Struct
from openapi_spec_validator import OpenAPIV31SpecValidator

import kvstore
from services.orders import app as orders_app
from services.users import app as users_app
from services.web.answers import json_response
from services.web.app import new_app
from services.web.bodies import RequestBody
from services.web.endpoints import Access, Api, Call, Condition, Query, get, post, put
from services.web.idempotency import KEPT_S, IdempotencyKeys
from services.web.ids import ID_MAX, Id
from services.web.limits import Limit
from services.web.openapi import document as document_of
from services.web.paging import Page, PageQuery, cursor_of, page_of
from services.web.problems import Problem
from services.web.tokens import Caller, Role, SigningKeys, Tokens
from tests.services.shop import problem


class Filter(Query, frozen=True):
    state: Annotated[str, Meta(pattern=r"\A[a-z]+\Z")] = "any"
    least: Annotated[int, Meta(ge=0)] = 0


class Thing(RequestBody, frozen=True):
    name: Annotated[str, Meta(max_length=5)]


class ThingBody(Struct, frozen=True):
    said: str


class Things:
    """One endpoint of each kind."""

    def __init__(self, store: kvstore.Client) -> None:
        self._store = store

    @get("/things/{id}", {200: ThingBody})
    async def read(self, call: Call, id: Id, query: Filter) -> web.Response:
        """Read a thing

        With a filter.
        """
        who = call.caller_if_any
        return _said(f"{id} {query.state} {query.least} {who.user_id if who else 'nobody'}")

    @get("/things", {200: Page[ThingBody]})
    async def list_things(self, call: Call, query: PageQuery) -> web.Response:
        """List things"""

        async def read(records: list[kvstore.Record]) -> list[ThingBody]:
            return [ThingBody(record.key.decode()) for record in records]

        return json_response(msgspec.json.encode(await page_of(self._store, b"thing/", query, read)))

    @post("/things/{id}", {201: ThingBody}, access=Access.SIGNED_IN, idempotent=True)
    async def make(self, call: Call, id: Id, body: Thing) -> web.Response:
        """Make a thing"""
        return _said(call.idempotency.key.decode())

    @put("/things/{id}", {200: ThingBody}, access=Access.STAFF, condition=Condition.REQUIRED)
    async def change(self, call: Call, id: Id, body: Thing) -> web.Response:
        """Change a thing"""
        return _said(call.caller.role)

    @post("/admin", {200: ThingBody}, access=Access.ADMIN)
    async def administer(self, call: Call) -> web.Response:
        """Administer"""
        return _said("done")

    @post("/hooks", {200: ThingBody}, reads_token=False, signed=True, problems=("invalid_webhook",))
    async def take(self, call: Call) -> web.Response:
        """Take what is signed"""
        body = await call.request.text()
        if body != "signed":
            raise Problem("invalid_webhook", "no signature")
        return _said(body)

    @get("/undeclared", {200: ThingBody})
    async def undeclared(self, call: Call) -> web.Response:
        """Answer what was not declared"""
        raise Problem("email_taken", "as if")


def _said(text: str) -> web.Response:
    return json_response(msgspec.json.encode(ThingBody(text)))


class Setup:
    def __init__(self, store: kvstore.Client, limit: Limit | None = None) -> None:
        self.store = store
        self.tokens = Tokens(SigningKeys(store))
        self.api = Api("Things", "For tests.", self.tokens, IdempotencyKeys(store), limit)
        self.api.add(Things(store), tag="Things")
        self.client: TestClient[Any, Any] = TestClient(TestServer(new_app(store, self.api)))

    async def __aenter__(self) -> Setup:
        await self.client.start_server()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()

    async def headers(self, role: Role, user_id: int = 7, **more: str) -> dict[str, str]:
        token = await self.tokens.issue(user_id, role)
        return {"Authorization": f"Bearer {token}", **{name.replace("_", "-"): value for name, value in more.items()}}


async def said(answer: Any) -> str:
    assert answer.status == 200, await answer.text()
    text: str = (await answer.json())["said"]
    return text


# --- what reaches a handler -------------------------------------------------------------------------------------------


async def test_paths_and_queries_arrive_checked(store: kvstore.Client) -> None:
    async with Setup(store) as setup:
        get_ = setup.client.get
        assert await said(await get_("/things/7")) == "7 any 0 nobody"
        assert await said(await get_("/things/7?state=new&least=3")) == "7 new 3 nobody"
        assert await said(await get_("/things/7", headers=await setup.headers(Role.CUSTOMER))) == "7 any 0 7"
        for wrong in ("0", "07", "-1", "x", str(ID_MAX + 1), "7.0"):
            await problem(await get_(f"/things/{wrong}"), 404, "not_found")
        for query, pointer in (
            ("least=-1", "/least"),
            ("least=x", "/least"),
            ("state=New", "/state"),
            ("unknown=1", "/unknown"),
        ):
            found = await problem(await get_(f"/things/7?{query}"), 400, "invalid_parameter")
            assert [(error["pointer"], error["in"]) for error in found["errors"]] == [(pointer, "query")]
        await problem(await get_("/things/7?least=1&least=2"), 400, "invalid_parameter")
        await problem(await get_("/undeclared?x=1"), 400, "malformed_request")


async def test_who_may_ask(store: kvstore.Client) -> None:
    async with Setup(store) as setup:
        client = setup.client
        await problem(await client.post("/admin"), 401, "authentication_required")
        await problem(await client.get("/things/7", headers={"Authorization": "Bearer x"}), 401, "invalid_token")
        for role in (Role.CUSTOMER, Role.STAFF):
            await problem(await client.post("/admin", headers=await setup.headers(role)), 403, "forbidden")
        assert await said(await client.post("/admin", headers=await setup.headers(Role.ADMIN))) == "done"


async def test_where_no_body_is_taken_none_may_be_sent(store: kvstore.Client) -> None:
    async with Setup(store) as setup:
        client, admin = setup.client, await setup.headers(Role.ADMIN)

        async def chunks() -> AsyncIterator[bytes]:
            yield b"{}"

        for data in (b"{{{garbage", b"{}", b" ", chunks()):
            await problem(await client.post("/admin", data=data, headers=admin), 400, "malformed_request")
            await problem(await client.post("/admin", data=data), 401, "authentication_required")
        await problem(await client.get("/things/7", data=b"{}"), 400, "malformed_request")
        for nothing in (None, b""):
            assert await said(await client.post("/admin", data=nothing, headers=admin)) == "done"


async def test_keys_and_preconditions_are_demanded(store: kvstore.Client) -> None:
    async with Setup(store) as setup:
        client, thing = setup.client, {"name": "a"}
        headers = await setup.headers(Role.CUSTOMER)
        await problem(await client.post("/things/7", json=thing, headers=headers), 400, "idempotency_key_required")
        once = await setup.headers(Role.CUSTOMER, Idempotency_Key="k")
        assert await said(await client.post("/things/7", json=thing, headers=once)) == "idem/7 POST /things/7 k"
        staff = await setup.headers(Role.STAFF)
        await problem(await client.put("/things/7", json=thing, headers=staff), 428, "precondition_required")
        matched = await setup.headers(Role.STAFF, If_Match='"7"')
        assert await said(await client.put("/things/7", json=thing, headers=matched)) == "staff"


async def test_records_of_idempotency_share_leases_and_end(store: kvstore.Client) -> None:
    now_s = 0.0
    keys = IdempotencyKeys(store, lambda: now_s)
    caller = Caller(7, Role.CUSTOMER)

    async def put(key: str) -> int:
        request = make_mocked_request("POST", "/things", headers={"Idempotency-Key": key})
        one = await keys.of(request, caller, "/things", None)
        await store.txn(success=[one.put(201, b"{}")])
        record = await store.get(one.key)
        assert record is not None
        return record.lease

    first = [await put(f"k{number}") for number in range(3)]
    assert len(set(first)) == 1
    now_s = 3599.0
    assert await put("last-of-the-hour") == first[0]
    now_s = 3600.0
    second = await put("next")
    assert second != first[0]
    status = await store.lease_status(first[0])
    assert status.key_count == 4
    # The last record under a lease comes an hour after it was granted, and is kept for a day even if clocks differ.
    assert status.ttl_ms >= (KEPT_S + 3600) * 1000
    await store.revoke_lease(first[0])
    assert await store.get(b"idem/7 POST /things k1") is None


async def test_a_problem_that_was_not_declared_is_said_in_the_log(
    store: kvstore.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    async with Setup(store) as setup:
        await problem(await setup.client.get("/undeclared"), 409, "email_taken")
    assert "undeclared problem" in capsys.readouterr().out


# --- lists ------------------------------------------------------------------------------------------------------------


async def test_a_list_comes_in_pages_each_record_once(store: kvstore.Client) -> None:
    names = [f"thing/{number:02d}" for number in range(45)]
    for name in (*names, "thing0", "thin"):
        await store.put(name.encode(), b"")
    async with Setup(store) as setup:
        seen: list[str] = []
        sizes: list[int] = []
        after = ""
        while True:
            answer = await setup.client.get(f"/things?limit=20{after}")
            page = await answer.json()
            seen += [thing["said"] for thing in page["data"]]
            sizes.append(len(page["data"]))
            assert page["has_more"] == (page["next_cursor"] is not None)
            if not page["has_more"]:
                break
            after = f"&starting_after={page['next_cursor']}"
        assert seen == names
        assert sizes == [20, 20, 5]
        for wrong in ("limit=0", "limit=101", "starting_after=", "starting_after=%21", "starting_after=abcde"):
            await problem(await setup.client.get(f"/things?{wrong}"), 400, "invalid_parameter")
        # A forged cursor leads nowhere but to another place of the same list.
        page = await (await setup.client.get(f"/things?starting_after={cursor_of(b'zz')}")).json()
        assert page == {"data": [], "has_more": False, "next_cursor": None}


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_limit_lets_a_quota_through_and_then_one_after_the_other() -> None:
    now = 0.0
    limit = Limit("test", 6, 60.0, lambda: now)
    assert [limit.take("a").remaining for _ in range(6)] == [5, 4, 3, 2, 1, 0]
    with pytest.raises(Problem) as refused:
        limit.take("a")
    assert refused.value.code == "rate_limited"
    assert refused.value.headers is not None
    assert refused.value.headers["Retry-After"] == "10"
    assert limit.take("b").remaining == 5
    now = 9.9
    with pytest.raises(Problem):
        limit.take("a")
    now = 10.0
    assert limit.take("a").remaining == 0
    now = 1000.0
    assert limit.take("a").remaining == 5


async def test_limits_are_per_caller_or_address_and_every_answer_says_how_one_stands(store: kvstore.Client) -> None:
    async with Setup(store, Limit("things", 3)) as setup:
        client, headers = setup.client, await setup.headers(Role.CUSTOMER)
        answer = await client.get("/things/7", headers=headers)
        assert answer.headers["RateLimit-Policy"] == '"things";q=3;w=60'
        assert answer.headers["RateLimit"].startswith('"things";r=2;t=')
        await problem(await client.get("/things/x", headers=headers), 404, "not_found")
        await client.get("/things/7", headers=headers)
        refused = await client.get("/things/7", headers=headers)
        await problem(refused, 429, "rate_limited")
        assert int(refused.headers["Retry-After"]) >= 1
        assert (await client.get("/things/7", headers=await setup.headers(Role.CUSTOMER, 8))).status == 200
        # Who guesses tokens is counted by address.
        for _ in range(3):
            await problem(await client.get("/things/7", headers={"Authorization": "Bearer x"}), 401, "invalid_token")
        await problem(await client.get("/things/7", headers={"Authorization": "Bearer x"}), 429, "rate_limited")
        await problem(await client.get("/things/7"), 429, "rate_limited")


async def test_what_is_signed_is_not_limited_and_what_is_forged_is(store: kvstore.Client) -> None:
    async with Setup(store, Limit("things", 3)) as setup:
        for _ in range(5):
            assert await said(await setup.client.post("/hooks", data="signed")) == "signed"
        for _ in range(3):
            await problem(await setup.client.post("/hooks", data="forged"), 400, "invalid_webhook")
        await problem(await setup.client.post("/hooks", data="forged"), 429, "rate_limited")
        assert await said(await setup.client.post("/hooks", data="signed")) == "signed"


# --- the document -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("create_app", [orders_app.create_app, users_app.create_app])
async def test_the_document_is_valid_and_names_every_endpoint(store: kvstore.Client, create_app: Any) -> None:
    app = create_app(store)
    client: TestClient[Any, Any] = TestClient(TestServer(app))
    async with client:
        document = await (await client.get("/openapi.json")).json()
        page = await client.get("/docs")
        assert page.content_type == "text/html"
        assert document["info"]["title"] in await page.text()
        for name in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png", "start.js"):
            assert (await client.get(f"/docs/{name}")).status == 200
        await problem(await client.get("/docs/index.html"), 404, "not_found")
    OpenAPIV31SpecValidator(document).validate()
    served = {
        (route.resource.canonical, route.method)
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    documented = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    about_itself = {"/livez", "/metrics", "/readyz", "/problems/{code}", "/openapi.json", "/docs", "/docs/{name}"}
    assert {one for one in served if one[0] not in about_itself} == documented


async def test_what_the_document_says_of_an_endpoint(store: kvstore.Client) -> None:
    async with Setup(store) as setup:
        document = await (await setup.client.get("/openapi.json")).json()
    OpenAPIV31SpecValidator(document).validate()
    read = document["paths"]["/things/{id}"]["get"]
    assert (read["summary"], read["description"]) == ("Read a thing", "With a filter.")
    assert {parameter["name"]: (parameter["in"], parameter["required"]) for parameter in read["parameters"]} == {
        "id": ("path", True),
        "state": ("query", False),
        "least": ("query", False),
    }
    assert next(p for p in read["parameters"] if p["name"] == "state")["schema"]["pattern"] == "^[a-z]+$"
    make = document["paths"]["/things/{id}"]["post"]
    assert make["security"] == [{"token": []}]
    assert "Idempotency-Key" in [parameter["name"] for parameter in make["parameters"]]
    assert set(make["responses"]) >= {"201", "400", "401", "404", "422", "429", "503"}
    change = document["paths"]["/things/{id}"]["put"]
    assert set(change["responses"]) >= {"200", "403", "412", "428"}
    assert document["components"]["schemas"]["Thing"]["additionalProperties"] is False


async def test_what_a_declaration_implies_is_in_the_document(store: kvstore.Client) -> None:
    async with Setup(store) as setup:
        document = await (await setup.client.get("/openapi.json")).json()
    paths, components = document["paths"], document["components"]
    # The problems of a status by their codes, each with an example; and the headers that come with it.
    make = paths["/things/{id}"]["post"]["responses"]
    content = make["400"]["content"]["application/problem+json"]
    narrowed = content["schema"]["allOf"][1]["properties"]
    assert narrowed["status"] == {"const": 400}
    assert "idempotency_key_required" in narrowed["code"]["enum"]
    assert set(content["examples"]) == set(narrowed["code"]["enum"]) <= set(components["examples"])
    for code, example in components["examples"].items():
        assert example["value"]["code"] == code
    assert "WWW-Authenticate" in make["401"]["headers"]
    assert {"Retry-After", "X-Request-Id"} <= set(make["503"]["headers"])
    assert {"Location", "Idempotent-Replayed"} <= set(make["201"]["headers"])
    for response in make.values():
        for header in response["headers"].values():
            assert header["$ref"].rpartition("/")[2] in components["headers"]
    # Where a token is needed, may be sent, and is passed over.
    assert paths["/things/{id}"]["get"]["security"] == [{}, {"token": []}]
    assert paths["/admin"]["post"]["security"] == [{"token": []}]


class Part(Struct, frozen=True):
    id: int
    number: int


class Linked:
    """Handlers are never called."""

    @post("/v1/parts", {201: Part})
    async def make_part(self, call: Call, body: Thing) -> web.Response:
        """Make a part"""
        raise NotImplementedError

    @get("/v1/parts", {200: Page[Part]})
    async def list_parts(self, call: Call, query: PageQuery) -> web.Response:
        """List parts"""
        raise NotImplementedError

    @get("/v1/parts/recent", {200: Part})
    async def read_recent(self, call: Call) -> web.Response:
        """Read the newest"""
        raise NotImplementedError

    @get("/v1/parts/{id}", {200: Part, 304: None})
    async def read_part(self, call: Call, id: Id) -> web.Response:
        """Read a part"""
        raise NotImplementedError

    @put("/v1/parts/{id}", {200: Part}, condition=Condition.OFFERED)
    async def put_part(self, call: Call, id: Id, body: Thing) -> web.Response:
        """Replace a part"""
        raise NotImplementedError

    @post("/v1/parts/{id}/screws", {201: Part})
    async def add_screw(self, call: Call, id: Id, body: Thing) -> web.Response:
        """Add a screw"""
        raise NotImplementedError

    @get("/v1/parts/{id}/screws/{number}", {200: Part})
    async def read_screw(self, call: Call, id: Id, number: Id) -> web.Response:
        """Read a screw"""
        raise NotImplementedError

    @get("/part/{id}", {200: Part})
    async def read_old(self, call: Call, id: Id) -> web.Response:
        """Read it as elsewhere"""
        raise NotImplementedError


async def test_answers_say_where_to_go_on(store: kvstore.Client) -> None:
    api = Api("Linked", "For tests.", Tokens(SigningKeys(store)), IdempotencyKeys(store))
    api.add(Linked(), tag="Parts")
    document = msgspec.json.decode(msgspec.json.encode(document_of(api)))
    paths = document["paths"]
    OpenAPIV31SpecValidator(document).validate()

    def links(method: str, path: str, status: str) -> dict[str, Any]:
        found = paths[path][method]["responses"][status].get("links", {})
        return {name: link["parameters"] for name, link in found.items()}

    of_body = {"id": "$response.body#/id"}
    assert links("post", "/v1/parts", "201") == {
        "read_part": of_body, "put_part": of_body, "add_screw": of_body, "read_old": of_body,
    }  # fmt: skip
    first = {"id": "$response.body#/data/0/id"}
    assert links("get", "/v1/parts", "200") == {
        "next_page": {"starting_after": "$response.body#/next_cursor"}, "read_part": first, "read_old": first,
    }  # fmt: skip
    same = {"id": "$request.path.id"}
    assert links("put", "/v1/parts/{id}", "200") == {"read_part": same, "add_screw": same, "read_old": same}
    screw = {"id": "$request.path.id", "number": "$response.body#/number"}
    assert links("post", "/v1/parts/{id}/screws", "201") == {"read_screw": screw}
    assert links("get", "/v1/parts/recent", "200") == {}


async def test_what_one_path_spells_out_is_no_parameter_of_another(store: kvstore.Client) -> None:
    api = Api("Linked", "For tests.", Tokens(SigningKeys(store)), IdempotencyKeys(store))
    api.add(Linked(), tag="Parts")
    client: TestClient[Any, Any] = TestClient(TestServer(new_app(store, api)))
    async with client:
        answer = await client.put("/v1/parts/recent", json={"name": "a"})
        await problem(answer, 405, "method_not_allowed")
        assert set(answer.headers["Allow"].split(",")) == {"GET", "HEAD"}
        await problem(await client.put("/v1/parts/recently", json={"name": "a"}), 404, "not_found")
