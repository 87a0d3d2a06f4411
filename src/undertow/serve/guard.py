"""What a request must get past before it is read: whose it is, where it was sent, and how long it is."""

from __future__ import annotations

import hmac
from collections.abc import Collection

from starlette.responses import JSONResponse

MAX_BODY = 1 << 20  # bytes
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A request that is not served, as OpenAI's API says it."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, headers=None):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    def response(self) -> JSONResponse:
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = self.message.encode("utf-8", "backslashreplace").decode()  # JSON may hold what UTF-8 may not
        body = {"message": message, "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": body}, self.status, headers=self.headers)


class Guard:
    """ASGI middleware. `key`: what `/v1` asks for (None: nothing); `hosts`: names it answers to (None: any).

    Names are checked where the server listens on this machine only: a web page that points a name of its own at
    127.0.0.1 must not be able to talk to it.
    """

    def __init__(self, app, key: str | None, hosts: Collection[str] | None):
        self.app, self.hosts = app, hosts
        self._key = None if key is None else key.encode()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            self._check(scope)
            body = await _body(receive)
        except Refused as refused:
            return await refused.response()(scope, receive, send)
        first = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed():
            return first.pop() if first else await receive()

        return await self.app(scope, replayed, send)

    def _check(self, scope):
        headers = dict(scope["headers"])
        if self.hosts is not None:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
            if name not in self.hosts:
                raise Refused(400, f"Host: this server answers to {sorted(self.hosts)} only")
        if self._key is not None and scope["path"].startswith("/v1"):
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
                say = {"WWW-Authenticate": "Bearer"}
                raise Refused(401, "a valid key is needed: Authorization: Bearer KEY", "invalid_api_key", headers=say)


async def _body(receive) -> bytes:
    """All of a request's body. Raises Refused: it is too long."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise Refused(413, f"the request is longer than {MAX_BODY} bytes", "request_too_large")
        if not message.get("more_body", False):
            return body
