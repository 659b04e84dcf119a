"""Requests that a served run refuses, drawn with a seed: as bytes, the way that they are sent.

The run is one of item_knn on the data set `tiny`, with vectors of 8 numbers, and its server wants the key
`KEY`.
"""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from tests.fuzz.harness import mutate

KEY = "the-key-of-the-fault-tests"
_AUTH = f"Authorization: Bearer {KEY}".encode()
_HOST = b"Host: localhost"
_JSON = b"Content-Type: application/json"
_ROUTES = ("/recommend", "/similar", "/items")
# What well-formed HTTP can be refused with; 401 only where the key is wrong.
_REFUSED = frozenset((400, 404, 405, 413, 415))
_ODD_TEXTS = (
    *("", " ", "\0", "\n", "\r\n", "[PAD]", "i99", "nobody", "../../etc/passwd", "' OR 1=1 --"),
    *("<script>", "${jndi:x}", "%s%n", "\u202etxt", "\ufeff", "\u2028", "e\u0301", "\U0001f600"),
    *("\ud800", "\udfff\ud800", "\uffff", "NaN", "-1", "1e999", "null"),
)
_GOOD: dict[str, dict[str, Any]] = {
    "/recommend": {"history": ["i1", "i2"], "topk": 3, "exclude": ["i3"], "diversify": 0.5},
    "/similar": {"item": "i1", "topk": 3, "filter": {"tag": ["1"]}},
    "/items": {"items": [{"item_id": "new", "text": {"tag": "1"}, "embedding": [0.5] * 8}]},
}
_SEEDS = [json.dumps(body).encode() for body in _GOOD.values()]
_WORDS = [f'"{name}"'.encode() for name in ("user", "find", "model", "times", "exclude_seen")]


@dataclass(frozen=True)
class BadRequest:
    """A request, or what is left of one.

    Attributes:
        kind: what is wrong with it.
        sent: the bytes of it.
        statuses: what it may be answered with; 0: the connection is closed without an answer.
        head: whether the answer has no body (method HEAD).
        framed: whether it is HTTP, so that the connection can be used again.
        ends: whether the client closes its side after it.
    """

    kind: str
    sent: bytes
    statuses: frozenset[int] = _REFUSED
    head: bool = False
    framed: bool = True
    ends: bool = False


def draw(rng: random.Random) -> BadRequest:
    """Draw a request; some, of mutated or repeated pieces, are good by chance."""
    kind = rng.choice(list(KINDS))
    return KINDS[kind](rng, kind)


def request(
    body: bytes, path: str = "/recommend", method: str = "POST", headers: tuple[bytes, ...] = ()
) -> bytes:
    """Return a request with the key."""
    lines = [
        f"{method} {path} HTTP/1.1".encode(),
        *(headers or (_HOST, _JSON, _AUTH)),
        b"Content-Length: %d" % len(body),
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def _body(rng: random.Random, path: str, **changes: Any) -> bytes:
    """Return a good body of a route with some keys replaced, in any order."""
    content = list({**_GOOD[path], **changes}.items())
    rng.shuffle(content)
    return json.dumps(dict(content), ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")


def _text(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(_ODD_TEXTS)
    top = rng.choice((0x7F, 0xFF, 0xFFFF, 0x10FFFF))
    return "".join(chr(rng.randint(0, top)) for _ in range(rng.choice((1, 3, 20, 200))))


def _integer(rng: random.Random) -> int:
    return rng.choice((-1, 1)) * rng.randrange(10 ** rng.choice((1, 2, 3, 9, 18, 19, 40, 400)))


def _float(rng: random.Random) -> float:
    odd = (float("nan"), float("inf"), -float("inf"), 1e308, -1e308, 5e-324, -0.0)
    return rng.choice((*odd, rng.uniform(-3, 3), rng.gauss(0, 1e9)))


def _value(rng: random.Random, *types: str, depth: int = 0) -> Any:
    """Return a JSON value of one of the types."""
    kind = rng.choice(types)
    inner = ("null", "bool", "int", "float", "text") + ("list", "object") * (depth < 3)
    if kind == "null":
        return None
    if kind == "bool":
        return rng.random() < 0.5
    if kind == "int":
        return _integer(rng)
    if kind == "float":
        return _float(rng)
    if kind == "text":
        return _text(rng)
    values = [_value(rng, *inner, depth=depth + 1) for _ in range(rng.randrange(4))]
    return values if kind == "list" else {_text(rng): value for value in values}


def _wrong_type(rng: random.Random, kind: str) -> BadRequest:
    path = rng.choice(_ROUTES)
    types: dict[str, dict[str, tuple[str, ...]]] = {
        "/recommend": {
            "history": ("bool", "int", "float", "text", "object"),
            "topk": ("bool", "float", "text", "list", "object"),
            "exclude": ("null", "bool", "int", "float", "text", "object"),
            "filter": ("null", "bool", "int", "float", "text", "list"),
            "diversify": ("null", "list", "object"),
            "model": ("bool", "int", "float", "list", "object"),
            "exclude_seen": ("null", "int", "float", "text", "list", "object"),
            "find": ("bool", "int", "float", "list", "object"),
            "user": ("bool", "int", "float", "list", "object"),
            "times": ("bool", "int", "float", "text", "object", "list"),
            "predict_at": ("bool", "int", "float", "text", "list", "object"),
        },
        "/similar": {"item": ("null", "bool", "int", "float", "list", "object")},
        "/items": {"items": ("null", "bool", "int", "float", "text", "object")},
    }
    wrong = types[path]
    key = rng.choice(list(wrong))
    return BadRequest(kind, request(_body(rng, path, **{key: _value(rng, *wrong[key])}), path))


def _whole_body(rng: random.Random, kind: str) -> BadRequest:
    content = json.dumps(_value(rng, "null", "bool", "int", "float", "text", "list")).encode()
    return BadRequest(kind, request(content, rng.choice(_ROUTES)))


def _number(rng: random.Random, kind: str) -> BadRequest:
    path = rng.choice(("/recommend", "/similar"))
    topk = rng.choice(("0", "-1", "101", "-0.5", "1e3", "NaN", "Infinity", "-Infinity", "1e999"))
    digits = "9" * rng.choice((3, 19, 20, 40, 309, 4000, 4301, 100_000))
    topk = rng.choice((topk, digits, f"-{digits}"))
    number = rng.choice(("-0.001", "1.001", "NaN", "Infinity", "-1e999", digits, f"-{digits}"))
    key, value = rng.choice((("topk", topk), ("diversify", number)))
    body = _body(rng, path, **{key: "HERE"}).replace(b'"HERE"', value.encode())
    return BadRequest(kind, request(body, path))


def _bad_item(rng: random.Random, kind: str) -> BadRequest:
    fine = {"item_id": f"n{rng.randrange(10**6)}", "embedding": [1.0] * 8}
    long = "x" * rng.choice((1001, 5000))
    # The first number makes the vector unusable.
    number = rng.choice(("NaN", "Infinity", "-1e999", "1e39", "9" * 400, "null", '"x"', "[]", "{}"))
    item: dict[str, Any] = rng.choice(
        (
            {**fine, "item_id": f"i{rng.randrange(20)}"},
            {**fine, "item_id": rng.choice(("", " n", "n ", "a\nb", "a\0b", long))},
            {**fine, "item_id": _value(rng, "null", "bool", "int", "float", "list", "object")},
            {"item_id": fine["item_id"], "embedding": [0.0] * 8},
            {**fine, "embedding": [1.0] * rng.choice((0, 1, 7, 9, 1000, 65_537))},
            {**fine, "embedding": ["HERE", *[1.0] * 7]},
            {**fine, "embedding": _value(rng, "bool", "int", "float", "text", "object")},
            {**fine, "text": _value(rng, "null", "bool", "int", "float", "text", "list")},
            {**fine, "text": {"tag": _value(rng, "null", "bool", "int", "float", "list")}},
            {**fine, "text": {f"no {_text(rng)}": "x"}},
            {**fine, "text": {"tag": "a\0b"}},
            {"item_id": fine["item_id"]},
            {"embedding": fine["embedding"]},
            {**fine, f"no {_text(rng)}": 1},
        )
    )
    others = [{**fine, "item_id": f"{fine['item_id']}-{n}"} for n in range(rng.choice((0, 1, 3)))]
    items = [*others, item, *([item] if rng.random() < 0.1 else [])]
    if rng.random() < 0.1:
        items = rng.choice(([], [*others, fine, fine], [fine] * 101))
    rng.shuffle(items)
    body = _body(rng, "/items", items=items).replace(b'"HERE"', number.encode())
    return BadRequest(kind, request(body, "/items"))


def _unknown(rng: random.Random, kind: str) -> BadRequest:
    path = rng.choice(("/recommend", "/similar"))
    name = f"no {_text(rng)}"
    changes: dict[str, Any] = rng.choice(
        (
            {"exclude": ["i1", name]},
            {"model": name},
            {"filter": {name: ["1"]}},
            {"filter": {"tag": []}},
            {name: 1},
            {"history": ["i1", name]} if path == "/recommend" else {"item": name},
            {"user": "u1"} if path == "/recommend" else {"user": name},
        )
    )
    return BadRequest(kind, request(_body(rng, path, **changes), path))


def _too_long(rng: random.Random, kind: str) -> BadRequest:
    path = rng.choice(("/recommend", "/similar"))
    long = "x" * rng.choice((1001, 10_000, 100_000))
    # Above 1 MiB; above 8 MiB it is not read to its end.
    huge = "x" * (rng.choice((1, 1, 1, 9)) << 20) if rng.random() < 0.05 else long
    changes: dict[str, Any] = rng.choice(
        (
            {"exclude": ["i1"] * rng.choice((10_001, 60_000))},
            {"exclude": [long]},
            {"filter": {f"c{n}": ["1"] for n in range(11)}},
            {"filter": {"tag": ["1"] * 101}},
            {"filter": {"tag": [long]}},
            {"filter": {long: ["1"]}},
            {"model": huge},
            {"history": ["i1"] * 10_001} if path == "/recommend" else {"item": long},
        )
    )
    sent = request(_body(rng, path, **changes), path)
    return BadRequest(kind, sent, frozenset((0, *_REFUSED)) if len(sent) > 8 << 20 else _REFUSED)


def _nesting(rng: random.Random, kind: str) -> BadRequest:
    depth = rng.choice((10, 100, 900, 1100, 5000, 100_000))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    if opening != "[":
        depth = min(depth, 150_000)
    inner = rng.choice(("1", '"x"', "null")) if rng.random() < 0.7 else ""
    nested = opening * depth + inner + (closing * depth if inner else "")
    key = rng.choice(("exclude", "filter", "history", "topk", "a"))
    body = rng.choice((nested, f'{{"history": ["i1"], "{key}": {nested}}}')).encode()
    return BadRequest(kind, request(body, rng.choice(_ROUTES)))


def _encoding(rng: random.Random, kind: str) -> BadRequest:
    """Something else than JSON in UTF-8; Python's reader takes UTF-16 and UTF-32 too."""
    content = json.dumps({"history": ["i1"], "é": rng.randrange(9)}, ensure_ascii=False)
    body = rng.choice(
        (
            content.encode("latin-1"),
            content.encode(rng.choice(("utf-16", "utf-32", "utf-16-le", "utf-32-be", "utf-8-sig"))),
            content.replace("é", "ｅ").encode("utf-7"),
            content.encode("cp500"),
            content.replace("é", "あ").encode("shift_jis"),
            gzip.compress(content.encode()),
            zlib.compress(content.encode()),
            content.encode().replace(b"\xc3\xa9", rng.choice((b"\xc3", b"\xff", b"\xc0\x80"))),
            content.encode().replace(b"\xc3\xa9", b"\xed\xa0\x80"),
            rng.randbytes(rng.choice((1, 10, 1000))),
        )
    )
    return BadRequest(kind, request(body, rng.choice(_ROUTES)))


def _mutated(rng: random.Random, kind: str) -> BadRequest:
    path = rng.choice(_ROUTES)
    body = mutate(rng, _SEEDS, _WORDS)
    return BadRequest(kind, request(body, path), _REFUSED | {200, 201})


def _repeated_key(rng: random.Random, kind: str) -> BadRequest:
    """The last one counts, as in most readers of JSON."""
    value = rng.choice(("0", "-1", "true", '"3"', "[]", "3.5"))
    fine, bad = '"topk": 3', f'"topk": {value}'
    first, last = rng.sample((fine, bad), 2)
    body = f'{{"history": ["i1"], {first}, {last}}}'.encode()
    return BadRequest(kind, request(body), _REFUSED if last == bad else frozenset((200,)))


def _method(rng: random.Random, kind: str) -> BadRequest:
    path = rng.choice(("/", "/info", "/users/u1", "/health", "/metrics", "/docs", "/recommend"))
    methods = ("HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "get", "A" * 300)
    method = rng.choice((*methods, "GET" if path == "/recommend" else "POST"))
    sent = request(b"" if method == "HEAD" else b"{}", path, method)
    return BadRequest(kind, sent, frozenset((405,)), head=method == "HEAD")


def _content_type(rng: random.Random, kind: str) -> BadRequest:
    types = (
        *("text/plain", "text/html", "application/xml", "application/x-www-form-urlencoded", ""),
        *("multipart/form-data; boundary=x", "application/octet-stream", "application/jsonp"),
        *("application/json-seq", "application/x-json", "json", "*/*", ";", "text/json"),
    )
    headers = (_HOST, _AUTH, f"Content-Type: {rng.choice(types)}".encode())
    path = rng.choice(_ROUTES)
    body = _body(rng, path)
    sent = request(body, path, headers=headers if rng.random() < 0.9 else headers[:2])
    return BadRequest(kind, sent, frozenset((415,)))


def _path(rng: random.Random, kind: str) -> BadRequest:
    name = quote(_text(rng), safe="/?&=;:@", errors="surrogatepass")
    odd = rng.choice(("%00", "%ff%fe", "%", "%zz", "..%2f..", "//", ".", "%2e%2e/"))
    before = rng.choice(
        ("/no", "/users/no", "/items/", "/similar/", "/.", "/serve.py/", "/users//")
    )
    return BadRequest(kind, request(b"", f"{before}{name}{odd}", "GET"), frozenset((404, 405)))


def _host(rng: random.Random, kind: str) -> BadRequest:
    hosts = ("evil.example", "localhost.evil.example", "", "[::1", "localhost@evil", "\xff", ":80")
    headers = (f"Host: {rng.choice(hosts)}".encode("latin-1"), _JSON, _AUTH)
    path = rng.choice(("/info", "/health", "/"))
    return BadRequest(kind, request(b"", path, "GET", headers), frozenset((400,)))


def _key(rng: random.Random, kind: str) -> BadRequest:
    values = (
        *("", "Bearer", "Bearer ", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", f"Bearer {KEY.upper()}"),
        *("Bearer \xe4\xff", "Basic", "Basic !!!", "Basic Og==", "Basic \xff", "Digest a=b", KEY),
        *("Basic " + "A" * 4000, "Bearer " + "x" * 8000, f"Bearer {KEY} {KEY}", f"Bearer {KEY},x"),
    )
    given = f"Authorization: {rng.choice(values)}".encode("latin-1")
    headers = (_HOST, _JSON, given) if rng.random() < 0.9 else (_HOST, _JSON)
    path = rng.choice((*_ROUTES, "/info", "/metrics", "/", "/docs", "/openapi.json", "/nothing"))
    sent = request(b"{}", path, rng.choice(("GET", "POST", "PUT")), headers)
    return BadRequest(kind, sent, frozenset((401,)))


def _http(rng: random.Random, kind: str) -> BadRequest:
    """What is no HTTP, or a part of HTTP that the server does not speak."""
    good = request(_body(rng, "/recommend"))
    line, _, rest = good.partition(b"\r\n")
    upgrade = b"GET /info HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, close\r\n" + _AUTH
    socket_key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13"
    post = b"POST /recommend HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    post += _JSON + b"\r\n" + _AUTH + b"\r\n"
    length = b"Content-Length: "
    sent = rng.choice(
        (
            rng.randbytes(rng.choice((1, 20, 300))) + b"\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(50) + b"\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            line.replace(b"1.1", rng.choice((b"9.9", b"1.", b"x", b"2"))) + b"\r\n" + rest,
            line.replace(b" ", rng.choice((b"", b"  ", b"\t")), 1) + b"\r\n" + rest,
            line
            + b"\r\n"
            + rng.choice((b"no colon", b": x", b"a b: c", b"X: \0"))
            + b"\r\n"
            + rest,
            line + b"\r\nX: " + b"x" * rng.choice((70_000, 200_000)) + b"\r\n" + rest,
            b"GET /" + b"x" * rng.choice((70_000, 200_000)) + b" HTTP/1.1\r\n\r\n",
            b"GET /it\xc3\xa9ms HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
            post
            + length
            + rng.choice((b"-1", b"+2", b"0x2", b"2 ", b"two", b"", b"2,2"))
            + b"\r\n\r\n{}",
            post + length + b"2\r\n" + length + b"3\r\n\r\n{}",
            post + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            post
            + b"Transfer-Encoding: chunked\r\n\r\n"
            + rng.choice((b"zz", b"-1", b""))
            + b"\r\n{}",
            post + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n\r\n",
            post + length + b"1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            upgrade + b"\r\nUpgrade: websocket\r\n" + socket_key + b"\r\n\r\n",
            upgrade + b"\r\nUpgrade: websocket\r\n\r\n",
            upgrade + b"\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n",
            b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        )
    )
    # An upgrade that the server does not speak is answered as if it were not asked for.
    allowed = _REFUSED | {0, 200, 401, 431}
    return BadRequest(kind, sent, allowed, framed=False)


def _cut_off(rng: random.Random, kind: str) -> BadRequest:
    path = rng.choice(_ROUTES)
    sent = request(_body(rng, path), path)
    end = rng.randrange(1, len(sent))
    return BadRequest(kind, sent[:end], frozenset((0, 400)), framed=False, ends=True)


KINDS: dict[str, Callable[[random.Random, str], BadRequest]] = {
    "wrong type": _wrong_type,
    "no object": _whole_body,
    "number": _number,
    "bad item": _bad_item,
    "unknown name": _unknown,
    "too long": _too_long,
    "nesting": _nesting,
    "encoding": _encoding,
    "mutated": _mutated,
    "repeated key": _repeated_key,
    "method": _method,
    "content type": _content_type,
    "path": _path,
    "host": _host,
    "key": _key,
    "HTTP": _http,
    "cut off": _cut_off,
}
