"""The user service as Flask + Redis would have it: `GET /user/{id}`, with what ours promises for it.

One round trip to Redis for a read. `BENCH_REDIS` is its socket. gunicorn runs it, in two processes.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec
from flask import Flask, Response, request
from redis import Redis

from bench.peers.web.tokens import Caller, Refused, TokenCheck

SOCKET = "BENCH_REDIS"
SIGNING_KEYS = "signing-keys"  # a hash: secrets by the keys' ids
ENDED_SESSIONS = "ended-sessions"  # a set
_encode = msgspec.json.Encoder().encode


def create_app() -> Flask:
    return build(Redis(unix_socket_path=os.environ[SOCKET]))


def build(redis: Any) -> Flask:
    # Any: the types of redis-py's answers hold all that any of its settings would give.

    app = Flask(__name__)
    check = TokenCheck()

    def caller() -> Caller:
        if check.is_stale():
            keys = {kid.decode(): secret for kid, secret in redis.hgetall(SIGNING_KEYS).items()}
            check.learn(keys, {session.decode() for session in redis.smembers(ENDED_SESSIONS)})
        return check.caller(request.headers.get("Authorization"))

    @app.get("/readyz")
    def readyz() -> Response:
        return Response(status=200 if redis.ping() else 503)

    @app.get("/user/<int:user_id>")
    def read_user(user_id: int) -> Response:
        try:
            asking = caller()
        except Refused as refusal:
            return _problem(401, str(refusal))
        if asking.user_id != user_id and asking.role == "customer":
            return _problem(404, "not_found")
        name, age, version = redis.hmget(f"user:{user_id}", "name", "age", "version")
        if name is None:
            return _problem(404, "not_found")
        tag = f'"{version.decode()}"'
        headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
        known = request.headers.get("If-None-Match")
        if known is not None and tag in [part.strip().removeprefix("W/") for part in known.split(",")]:
            return Response(status=304, headers=headers)
        body = _encode({"id": user_id, "name": name.decode(), "age": int(age)})
        return Response(body, headers=headers, mimetype="application/json")

    return app


def _problem(status: int, code: str) -> Response:
    body = _encode({"type": f"/problems/{code}", "status": status, "code": code})
    return Response(body, status, mimetype="application/problem+json")
