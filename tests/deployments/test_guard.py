"""The guard in front of a small application: no Ray, no engine."""

import asyncio
import base64
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deployments import keyring, tls, top
from deployments.config import Auth, ConfigError, HttpOptions, Limits, ServeFile
from deployments.guard import Guard
from deployments.keyring import KeyFileError, KeyRing
from deployments.local import launch


async def tell(request: Request) -> Response:
    """What comes through."""
    admitted = request.state.admitted
    await asyncio.sleep(float(request.headers.get("x-wait", 0)))
    return JSONResponse(
        {
            "body": (await request.body()).decode(),
            "authorization": request.headers.get("authorization"),
            "key": admitted.key and admitted.key.name,
            "salt": admitted.cache_salt(request.headers.get("x-salt")),
            "priority": getattr(request.state, "priority", None),
        }
    )


def client(ring: KeyRing | None, folder: Path, root_path: str = "", **limits: Any) -> httpx.AsyncClient:
    auth = None
    if ring is not None:
        keyring.write(folder / "keys.json", ring)
        auth = Auth(keys_file=str(folder / "keys.json"))
    app = Starlette(routes=[Route("/{path:path}", tell, methods=["GET", "POST"])])
    guarded = Guard(app, auth=auth, limits=Limits(**limits))
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(guarded, root_path=root_path), base_url="http://here", trust_env=False
    )


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


@pytest.mark.asyncio
async def test_without_keys_nothing_changes(tmp_path: Path) -> None:
    async with client(None, tmp_path) as http:
        told = (await http.post("/v1/completions", content="x", headers={"x-salt": "own"})).json()
    assert told == {"body": "x", "authorization": None, "key": None, "salt": "own", "priority": None}


@pytest.mark.asyncio
async def test_a_key_opens_and_goes_no_further(tmp_path: Path) -> None:
    ring, secret = KeyRing.new().add("alice")
    async with client(ring, tmp_path) as http:
        told = (await http.post("/v1/completions", content="x", headers=bearer(secret) | {"x-salt": "own"})).json()
        assert told["authorization"] is None
        assert (told["key"], told["salt"]) == ("alice", ring.cache_salt(ring.keys[0], "own"))
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/health", headers={"Authorization": "Bearer wrong"})).status_code == 200
        for path in ("/", "/v1/models", "/health/", "/healthx", "/HEALTH", "/v1/health", "/%2Fhealth"):
            assert (await http.get(path)).status_code == 401, path
        for header in ({}, {"Authorization": secret}, {"Authorization": "Bearer "}, {"Authorization": "Bearer ü"}):
            raw = {name: value.encode() for name, value in header.items()}
            got = await http.get("/v1/models", headers=raw)
            assert got.status_code == 401
            assert secret not in got.text
    async with client(ring, tmp_path, root_path="/llm") as http:
        assert (await http.get("/llm/health")).status_code == 200
        assert (await http.get("/llm/v1/models")).status_code == 401


@pytest.mark.asyncio
async def test_the_memory_map_wants_an_admin_and_takes_a_password(tmp_path: Path) -> None:
    ring, admin = KeyRing.new().add("root", admin=True)
    ring, plain = ring.add("alice")
    async with client(ring, tmp_path) as http:
        for path in ("/memory", "/memory/", "/memory/data"):
            assert (await http.get(path, headers=bearer(admin))).status_code == 200
            assert (await http.get(path, headers=bearer(plain))).status_code == 403
            assert (await http.get(path)).headers["www-authenticate"].startswith("Basic")
            for secret, status in ((admin, 200), (plain, 403), ("x", 401)):
                basic = base64.b64encode(f"me:{secret}".encode()).decode()
                assert (await http.get(path, headers={"Authorization": f"Basic {basic}"})).status_code == status
        assert (await http.get("/memory", headers={"Authorization": "Basic §".encode()})).status_code == 401


@pytest.mark.asyncio
async def test_bodies_are_bounded_also_where_no_length_is_told(tmp_path: Path) -> None:
    async def pieces(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b"x" * 100

    async with client(None, tmp_path, body=1000) as http:
        assert (await http.post("/", content=b"x" * 1000)).json()["body"] == "x" * 1000
        assert (await http.post("/", content=pieces(10))).status_code == 200
        for content in (b"x" * 1001, pieces(11)):
            got = await http.post("/", content=content)
            assert got.status_code == 413
            assert "1,000 bytes" in got.json()["error"]["message"]


@pytest.mark.asyncio
async def test_a_body_that_does_not_end_is_given_up(tmp_path: Path) -> None:
    async def drip() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0.05)

    async with client(None, tmp_path, request_s=0.3) as http:
        got = await http.post("/", content=drip())
    assert (got.status_code, got.json()["error"]["code"]) == (408, "request_timeout")


@pytest.mark.asyncio
async def test_requests_at_the_same_time_are_counted_until_they_end(tmp_path: Path) -> None:
    ring, secret = KeyRing.new().add("alice", concurrent_requests=2)
    async with client(ring, tmp_path) as http:

        async def ask(wait: float) -> httpx.Response:
            return await http.post("/", headers=bearer(secret) | {"x-wait": str(wait)})

        first = [asyncio.create_task(ask(60)), asyncio.create_task(ask(0.5))]
        await asyncio.sleep(0.1)
        got = await ask(0)
        assert (got.status_code, got.json()["error"]["type"], got.headers["retry-after"]) == (429, "requests", "1")
        assert (await http.get("/v1/models", headers=bearer(secret))).status_code == 200
        first[0].cancel()
        assert (await first[1]).status_code == 200
        assert [(await ask(0)).status_code for _ in range(3)] == [200] * 3


def test_the_ingress_does_not_start_without_its_keys(tmp_path: Path) -> None:
    auth = Auth(keys_file=str(tmp_path / "absent"))
    with pytest.raises(KeyFileError, match="jenga keys add"):
        Guard(Starlette(), auth=auth, limits=Limits())
    for both in ({}, {"keys_file": "a", "keys_variable": "B"}):
        with pytest.raises(ValidationError, match="either"):
            Auth(**both)


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def test_files_that_cannot_serve_tls_are_named_before_anything_starts(tmp_path: Path) -> None:
    cert, key, other, locked = (tmp_path / name for name in ("cert.pem", "key.pem", "other.pem", "locked.pem"))
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *new_key, "-subj", "/CN=here", "-days", "2", "-keyout", key, "-out", cert)
    openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", other)
    openssl("pkey", "-in", key, "-aes256", "-passout", "pass:secret", "-out", locked)
    tls.check(str(cert), str(key))
    assert isinstance(tls.client_context(str(cert)), ssl.SSLContext)
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n")
    for pair, said in {
        (tmp_path / "no", key): "ssl_certfile: there is no file",
        (cert, tmp_path / "no"): "ssl_keyfile: there is no file",
        (tmp_path, key): "ssl_certfile: .* cannot be read: Is a directory",
        (key, key): "ssl_certfile: .* is no PEM file with a certificate",
        (cert, cert): "ssl_keyfile: .* is no PEM file with a private key",
        (cert, other): "ssl_keyfile: .*other.pem is not the key of the certificate",
        (cert, locked): "ssl_keyfile: .*locked.pem is encrypted",
        (garbage, key): "OpenSSL does not take",
    }.items():
        with pytest.raises(ConfigError, match=said):
            tls.check(*map(str, pair))
    with pytest.raises(ValidationError, match=r"limits\.request_s"):
        HttpOptions(request_timeout_s=60)
    with pytest.raises(ValidationError, match="go together"):
        HttpOptions(ssl_certfile="x")


def test_serving_refuses_a_missing_key_file_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    data = {"applications": [{"args": {"model": {"id": "m", "path": str(tmp_path)}, "auth": {"keys_file": "absent"}}}]}
    with pytest.raises(ConfigError, match=r"auth\.keys_file: there is no key file /.*/absent; `jenga keys add"):
        launch._with_options(ServeFile.model_validate(data), launch.Options())


def test_top_says_which_variable_takes_the_key() -> None:
    def said(message: str, code: str) -> str:
        return top._why_not("http://here", httpx.Response(401), {"error": {"message": message, "code": code}})

    remedy = "; put a key made with `jenga keys add --admin` into $JENGA_API_KEY"
    assert f"admin keys only (Incorrect API key provided.){remedy}" in said(
        "Incorrect API key provided.", "invalid_api_key"
    )
    assert f"admin keys only{remedy}" in said("You did not provide an API key.", "missing_api_key")


@pytest.mark.asyncio
async def test_an_overload_is_refused_with_the_time_to_come_back(tmp_path: Path) -> None:
    async with client(None, tmp_path, requests=2, body=300, bodies=300) as http:
        running = [asyncio.create_task(http.post("/x", content="x", headers={"x-wait": "0.4"})) for _ in range(2)]
        await asyncio.sleep(0.1)
        for refused in (await http.post("/x", content="x"), await http.get("/x")):
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "overloaded"
            assert int(refused.headers["retry-after"]) > 0
        assert (await http.get("/health")).status_code == 200
        assert [each.status_code for each in await asyncio.gather(*running)] == [200, 200]
        large = [http.post("/x", content="x" * 200, headers={"x-wait": "0.2"}) for _ in range(2)]
        assert sorted(each.status_code for each in await asyncio.gather(*large)) == [200, 503]
        for _ in range(3):
            assert (await http.post("/x", content="x" * 200)).status_code == 200, "what is over no longer counts"


@pytest.mark.asyncio
async def test_a_body_that_comes_slowly_or_not_whole_holds_nothing(tmp_path: Path) -> None:
    async def slowly() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0.05)

    async with client(None, tmp_path, body_s=0.2, body=300, bodies=300) as http:
        for _ in range(3):
            late = await http.post("/x", content=slowly())
            assert late.status_code == 408
            assert "limits.body_s" in late.json()["error"]["message"]
        refused = await http.post("/x", content=b'{"a": ' + b"[" * 100)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "nested_too_deeply")
        assert (await http.post("/x", content="x" * 290)).status_code == 200


@pytest.mark.asyncio
async def test_who_has_no_key_takes_no_place_with_a_body(tmp_path: Path) -> None:
    ring, secret = KeyRing.new().add("alice")

    async def never_ending() -> AsyncIterator[bytes]:
        yield b"x" * 290
        await asyncio.sleep(3600)

    async def health(request: Request) -> Response:
        return Response(status_code=405)

    keyring.write(tmp_path / "keys.json", ring)
    routes = [Route("/health", health, methods=["POST"]), Route("/x", tell, methods=["POST"])]
    guarded = Guard(
        Starlette(routes=routes), auth=Auth(keys_file=str(tmp_path / "keys.json")), limits=Limits(bodies=300, body=300)
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="http://here") as http:
        async with asyncio.timeout(20):
            assert (await http.post("/health", content=never_ending())).status_code == 405
            assert (await http.post("/x", content=never_ending())).status_code == 401
            assert (await http.post("/x", content="x" * 290, headers=bearer(secret))).status_code == 200


@pytest.mark.asyncio
async def test_who_has_much_in_progress_is_put_back(tmp_path: Path) -> None:
    ring, keys = KeyRing.new(), {}
    for name in ("one", "other"):
        ring, keys[name] = ring.add(name)
    async with client(ring, tmp_path) as http:

        async def priority(who: str, wait: str = "0") -> int:
            got = await http.post("/x", content="x", headers=bearer(keys[who]) | {"x-wait": wait})
            place: int = got.json()["priority"]
            return place

        flood = [asyncio.create_task(priority("one", "0.3")) for _ in range(3)]
        await asyncio.sleep(0.1)
        single = await priority("other")
        first, second, third = sorted(await asyncio.gather(*flood))
        assert first < single < second < third
        assert await priority("one") < third, "they are over"


@pytest.mark.asyncio
async def test_one_tenant_leaves_places_for_others(tmp_path: Path) -> None:
    ring, keys = KeyRing.new(), {}
    for name in ("one", "other"):
        ring, keys[name] = ring.add(name)
    async with client(ring, tmp_path, requests=4) as http:

        async def post(who: str) -> int:
            got = await http.post("/x", content="x", headers=bearer(keys[who]) | {"x-wait": "0.3"})
            return got.status_code

        flood = [asyncio.create_task(post("one")) for _ in range(6)]
        await asyncio.sleep(0.1)
        assert await post("other") == 200
        assert sorted(await asyncio.gather(*flood)) == [200] * 3 + [503] * 3
        assert await post("one") == 200
    async with client(ring, tmp_path, body=100, bodies=400) as http:

        async def send(who: str) -> int:
            got = await http.post("/x", content="x" * 100, headers=bearer(keys[who]) | {"x-wait": "0.3"})
            return got.status_code

        for _ in range(2):  # what is over no longer counts
            flood = [asyncio.create_task(send("one")) for _ in range(5)]
            await asyncio.sleep(0.1)
            assert await send("other") == 200
            assert sorted(await asyncio.gather(*flood)) == [200] * 3 + [503] * 2
    async with client(ring, tmp_path, body=100, bodies=100) as http:
        assert await send("one") == 200, "any one body that is allowed fits"
