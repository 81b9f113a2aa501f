"""`jenga serve` with API keys, TLS and limits: one engine, and what clients of different tenants get of it."""

import base64
import functools
import http.client
import json
import os
import re
import ssl
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from deployments import keyring
from deployments.local.ports import free_ports
from deployments.local.record import API_KEY, Record, read
from tests.e2e.test_serve import MODEL, configuration, jenga

pytestmark = pytest.mark.timeout(600)

BODY = 64 << 10
PROMPT_TOKENS = 300
REQUEST_S = 8.0
MARKER = "qzj-xwv-"
"""Part of every prompt here; no log may have it."""
# Who holds a key: name, tenant, further options.
HOLDERS = {
    "alice": ("acme",),
    "carol": ("acme",),
    "bob": ("umbrella",),
    "root": ("operators", "--admin"),
    "single": ("small", "--concurrent-requests", "1"),
    "seldom": ("small", "--requests-per-minute", "2"),
}


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate signed by itself, and its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(key))
    made = ("openssl", "req", "-x509", *new_key, "-subj", "/CN=localhost", "-days", "30", "-out", str(cert))
    subprocess.run(made, check=True, capture_output=True)
    return cert, key


@dataclass(frozen=True)
class Safe:
    """The deployment under test."""

    state: Path
    keys_file: Path
    secrets: dict[str, str]
    certificate: Path
    metrics_port: int
    output: str
    record: Record

    def http(self, who: str | None) -> httpx.Client:
        trust = ssl.create_default_context(cafile=str(self.certificate))
        trust.check_hostname = False
        headers = {} if who is None else {"Authorization": f"Bearer {self.secrets[who]}"}
        return httpx.Client(base_url=self.record.url, timeout=60, trust_env=False, headers=headers, verify=trust)

    def ask(self, who: str | None, path: str = "/v1/completions", **fields: Any) -> httpx.Response:
        with self.http(who) as client:
            return client.post(path, json={"model": MODEL, "max_tokens": 2, "temperature": 0} | fields)

    def counter(self, name: str, label: str) -> dict[str, float]:
        """A counter in Prometheus' form, summed by one label."""
        found: dict[str, float] = {}
        text = httpx.get(self.record.metrics_url, timeout=30, trust_env=False).text
        for labels, value in re.findall(rf"^{name}\{{(.*)\}} ([\d.e+]+)$", text, re.MULTILINE):
            key = dict(re.findall(r'(\w+)="([^"]*)"', labels))[label]
            found[key] = found.get(key, 0) + float(value)
        return found


@pytest.fixture(scope="module")
def safe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Safe]:
    folder = tmp_path_factory.mktemp("safe")
    state, keys_file = folder / "run", folder / "keys.json"
    secrets = {}
    for name, (tenant, *options) in HOLDERS.items():
        made = jenga(state, "keys", "add", str(keys_file), name, "--tenant", tenant, *options)
        assert made.returncode == 0, made.stderr
        secrets[name] = made.stdout.strip()
    cert, key = certificate(folder)
    port, dashboard, metrics = free_ports(3)
    data = configuration(port, max_num_seqs=4)
    data["http_options"] |= {"ssl_certfile": str(cert), "ssl_keyfile": str(key)}
    data["applications"][0]["args"] |= {
        "replicas": 1,
        "auth": {"keys_file": str(keys_file)},
        "limits": {"body": BODY, "prompt_tokens": PROMPT_TOKENS, "request_s": REQUEST_S, "sequences": 64},
    }
    config = folder / "serving.yaml"
    config.write_text(yaml.safe_dump(data))
    ports = ["--dashboard-port", str(dashboard), "--metrics-port", str(metrics)]
    os.environ[API_KEY] = secrets["root"]
    try:
        result = jenga(state, "serve", str(config), *ports)
        assert result.returncode == 0, result.stdout + result.stderr
        record = read(state)
        assert record is not None
        yield Safe(state, keys_file, secrets, cert, metrics, result.stdout, record)
    finally:
        jenga(state, "stop")
        del os.environ[API_KEY]


def cached(response: httpx.Response) -> int:
    assert response.status_code == 200, response.text
    tokens: int = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


def refused(response: httpx.Response) -> tuple[int, str]:
    """Status and code of an error in OpenAI's form."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["code"]


def test_the_start_presents_the_key_and_trusts_the_certificate(safe: Safe) -> None:
    assert safe.record.url.startswith("https://")
    assert f"--cacert {safe.certificate}" in safe.output
    assert f"Bearer ${API_KEY}" in safe.output
    assert '"object": "chat.completion"' in safe.output
    top = jenga(safe.state, "top", "--json")
    assert top.returncode == 0, top.stderr
    assert len(json.loads(top.stdout)["replicas"]) == 1


def predictions(safe: Safe, at_least: int) -> dict[str, float]:
    """The router's predictions by outcome, once so many are counted."""
    end = time.monotonic() + 60
    while sum((found := safe.counter("ray_jenga_router_predictions_total", "outcome")).values()) < at_least:
        assert time.monotonic() < end, found
        time.sleep(1)
    return {outcome: count for outcome, count in found.items() if count}


def test_no_tenant_hits_what_another_cached_and_the_router_knows_it(safe: Safe) -> None:
    asked = 0
    ring = keyring.read(safe.keys_file)
    bobs = ring.cache_salt(next(key for key in ring.keys if key.name == "bob"), None)

    def ask_as(who: str, salt: str | None = None, *, text: str, chat: bool) -> int:
        nonlocal asked
        asked += 1
        own = {} if salt is None else {"cache_salt": salt}
        if chat:
            return cached(safe.ask(who, "/v1/chat/completions", messages=[{"role": "user", "content": text}], **own))
        return cached(safe.ask(who, prompt=text, **own))

    for turn, chat in enumerate((False, True) * 3):
        ask = functools.partial(ask_as, text=f"{turn}{MARKER}" + "k" * 200, chat=chat)
        assert ask("alice") == 0
        hit = ask("alice")
        assert hit == 192, "all whole pages"
        assert ask("carol") == hit, "keys of one tenant share"
        assert ask("bob") == 0, "another tenant does not"
        assert ask("bob") == hit
        assert ask("bob", "own") == 0, "a client's own salt counts within its tenant"
        assert ask("bob", "own") == hit
        assert ask("alice", "own") == 0, "and never instead of it"
        assert ask("alice", bobs) == 0, "not even another tenant's whole salt helps"
    found = predictions(safe, asked)
    # Blind to salts, most would be wrong; an event that comes late makes one `under` now and then.
    assert "over" not in found
    assert found["exact"] >= asked - 2, found


def test_plain_http_is_not_answered(safe: Safe) -> None:
    with pytest.raises((httpx.HTTPError, http.client.HTTPException)):
        httpx.get(safe.record.url.replace("https", "http") + "/health", timeout=10, trust_env=False)


def test_every_path_but_health_asks_for_a_key(safe: Safe) -> None:
    with safe.http(None) as nobody:
        assert nobody.get("/health").status_code == 200
        for path in ("/v1/models", "/memory", "/memory/data", "/docs", "/openapi.json", "/nothing", "//health"):
            got = nobody.get(path)
            assert refused(got) == (401, "missing_api_key"), path
            assert got.headers["www-authenticate"].startswith("Basic" if path.startswith("/memory") else "Bearer")
    assert refused(safe.ask(None, prompt="x")) == (401, "missing_api_key")
    stranger = keyring.KeyRing.new().add("alice")[1]
    with safe.http(None) as client:
        for wrong in (stranger, safe.secrets["alice"][:-1], safe.secrets["alice"].upper(), "x", "jenga--"):
            got = client.get("/v1/models", headers={"Authorization": f"Bearer {wrong}"})
            assert refused(got) == (401, "invalid_api_key")
    trusting = safe.http(None)
    with trusting, pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{safe.record.url}/v1", api_key=stranger, http_client=trusting).models.list()
    trusting = safe.http(None)
    with trusting:
        key = safe.secrets["bob"]
        models = openai.OpenAI(base_url=f"{safe.record.url}/v1", api_key=key, http_client=trusting).models.list()
    assert [model.id for model in models.data] == [MODEL]


def test_the_memory_map_is_for_admins_also_in_a_browser(safe: Safe) -> None:
    with safe.http("alice") as client:
        assert refused(client.get("/memory/data")) == (403, "admin_key_required")
    with safe.http("root") as client:
        assert client.get("/memory/data").status_code == 200
    with safe.http(None) as client:
        for who, status in (("root", 200), ("alice", 403)):
            password = base64.b64encode(f"anybody:{safe.secrets[who]}".encode()).decode()
            assert client.get("/memory", headers={"Authorization": f"Basic {password}"}).status_code == status
            models = client.get("/v1/models", headers={"Authorization": f"Basic {password}"})
            assert refused(models) == (401, "missing_api_key")


def test_limits_of_size_and_length_are_told_by_name(safe: Safe) -> None:
    large = json.dumps({"model": MODEL, "prompt": MARKER * BODY}).encode()
    with safe.http("alice") as client:
        sized = client.post("/v1/completions", content=large, headers={"Content-Type": "application/json"})
    assert refused(sized) == (413, "request_too_large")
    assert "limits.body" in sized.json()["error"]["message"]
    with safe.http("alice") as client:
        pieces = (large[i : i + 10_000] for i in range(0, len(large), 10_000))
        chunked = client.post("/v1/completions", content=pieces, headers={"Content-Type": "application/json"})
    assert refused(chunked) == (413, "request_too_large")
    for prompt in ([7] * 301, [[7] * 5, [7] * 301], "k" * 301 + " " + MARKER, ["k", "k" * 301]):
        got = safe.ask("alice", prompt=prompt)
        assert refused(got) == (400, "context_length_exceeded"), prompt
        assert "limits.prompt_tokens" in got.json()["error"]["message"]
    assert refused(safe.ask("alice", prompt=["k"] * 33, n=2)) == (400, "too_many_sequences")
    assert safe.ask("alice", prompt=["k"] * 4, n=2, temperature=1).status_code == 200


def test_a_key_has_its_own_limits(safe: Safe) -> None:
    assert [safe.ask("seldom", prompt="k").status_code for _ in range(2)] == [200, 200]
    got = safe.ask("seldom", prompt="k")
    assert refused(got) == (429, "rate_limit_exceeded")
    assert 1 <= int(got.headers["retry-after"]) <= 30
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(safe.ask, "single", prompt="k", max_tokens=250, ignore_eos=True) for _ in range(4)]
        codes = sorted(future.result().status_code for future in asked)
    assert codes[0] == 200
    assert codes[-1] == 429
    assert safe.ask("single", prompt="k").status_code == 200, "what is over no longer counts"
    assert safe.ask("alice", prompt="k").status_code == 200


def report(safe: Safe) -> dict[str, Any]:
    """What the engine told last of its requests; a few seconds old."""
    with safe.http("root") as client:
        (replica,) = client.get("/memory/data").json()["replicas"]
    told: dict[str, Any] = replica["report"]
    return told


def test_a_request_that_takes_too_long_ends_in_the_engine_too(safe: Safe) -> None:
    endless: dict[str, Any] = {"prompt": [MARKER] * 64, "max_tokens": 480, "ignore_eos": True}
    body = {"model": MODEL, "temperature": 0, "stream": True} | endless
    before = report(safe)["hits"]["requests"]
    with safe.http("alice") as client, client.stream("POST", "/v1/completions", json=body) as stream:
        assert stream.status_code == 200
        lines = stream.iter_lines()
        assert '"text"' in next(lines)
        whole = safe.ask("alice", **endless)
        assert refused(whole) == (408, "request_timeout")
        assert whole.headers["x-should-retry"] == "false"
        *_, last = [line for line in lines if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_timeout"
    end = time.monotonic() + 60
    while (last := report(safe))["requests"]["resident"] or last["requests"]["waiting"]:
        assert time.monotonic() < end, last["requests"]
        time.sleep(0.5)
    assert 4 <= last["hits"]["requests"] - before < 2 * 64, "the rest was never begun"


def test_a_changed_key_file_counts_without_a_restart(safe: Safe) -> None:
    added = jenga(safe.state, "keys", "add", str(safe.keys_file), "late")
    removed = jenga(safe.state, "keys", "remove", str(safe.keys_file), "carol")
    assert (added.returncode, removed.returncode) == (0, 0), added.stderr + removed.stderr
    safe.secrets["late"] = added.stdout.strip()
    end = time.monotonic() + 30
    while safe.ask("late", prompt="k").status_code != 200 or safe.ask("carol", prompt="k").status_code != 401:
        assert time.monotonic() < end
        time.sleep(0.5)
    good = safe.keys_file.read_text()
    safe.keys_file.write_text("{")
    time.sleep(1.5)
    assert safe.ask("late", prompt="k").status_code == 200, "a broken file changes nothing"
    safe.keys_file.write_text(good)


def test_logs_hold_neither_keys_nor_prompts(safe: Safe) -> None:
    """Last: all of the above must have been logged."""
    for bad in (
        {"prompt": MARKER, "max_tokens": MARKER},
        {"prompt": {MARKER: 1}},
        {"prompt": MARKER, "logit_bias": {MARKER: 1}},
        {"prompt": MARKER, "temperature": -1},
        {"prompt": MARKER, "response_format": {"type": "json_schema", "json_schema": {"name": MARKER, "schema": 3}}},
    ):
        assert 400 <= safe.ask("alice", **bad).status_code < 500, bad
    messages = [{"role": "user", "content": [{"type": MARKER}]}]
    assert 400 <= safe.ask("alice", "/v1/chat/completions", messages=messages).status_code < 500
    with safe.http("alice") as client:
        client.post("/v1/completions", content=b'{"prompt": "' + MARKER.encode())
    time.sleep(2)
    logs = [file for file in Path(safe.record.ray_dir).rglob("logs/**/*") if file.is_file()]
    logs += list(Path(safe.record.log).parent.iterdir())
    texts = {str(file): file.read_text(errors="replace") for file in logs}
    assert any("Ingress" in name for name in texts)
    assert any("POST /v1/completions 413" in text for text in texts.values()), "these are the logs"
    ring = keyring.read(safe.keys_file)
    hidden = [MARKER, ring.salt_secret, *safe.secrets.values(), *(key.hash for key in ring.keys)]
    told = [
        (name, text[max(0, text.index(word) - 200) :][:500])
        for name, text in texts.items()
        for word in hidden
        if word in text
    ]
    assert not told
    assert not [secret for secret in safe.secrets.values() if secret in safe.output]
