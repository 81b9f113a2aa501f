"""API keys: at rest, in the ring, in force."""

import json
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from deployments import key_cli, keyring
from deployments.keyring import KeyFileError, KeyRing, LiveKeys
from deployments.quota import Quotas


def run(*arguments: str | Path) -> tuple[int, str, str]:
    app = typer.Typer()
    app.add_typer(key_cli.app)
    done = CliRunner().invoke(app, ["keys", *map(str, arguments)], env={"COLUMNS": "200"})
    return done.exit_code, done.stdout, done.stderr


def test_the_command_keeps_hashes_and_shows_a_secret_once(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    code, secret, _ = run("add", file, "alice", "--tenant", "acme", "--admin", "--requests-per-minute", "9")
    assert code == 0
    secret = secret.strip()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    text = file.read_text()
    assert secret not in text
    assert secret.split("-", 2)[2] not in text
    ring = keyring.read(file)
    found = ring.find(secret)
    assert found is not None
    assert (found.name, found.tenant, found.admin, found.requests_per_minute) == ("alice", "acme", True, 9)
    assert run("add", file, "bob")[0] == 0
    shown = run("list", file)[1]
    assert "alice" in shown
    assert found.hash[:8] not in shown
    assert [key["name"] for key in json.loads(run("list", file, "--json")[1])] == ["alice", "bob"]
    assert keyring.read(file).salt_secret == ring.salt_secret, "cached prompts stay theirs"
    assert run("remove", file, "alice")[0] == 0
    assert keyring.read(file).find(secret) is None
    for said, arguments in {
        "no key 'alice' (there: bob)": ("remove", file, "alice"),
        "a key 'bob' already": ("add", file, "bob"),
        "name 'a b'": ("add", file, "a b"),
        "no key file": ("list", tmp_path / "absent"),
        "cannot be opened": ("add", tmp_path / "no" / "folder", "x"),
    }.items():
        code, _, told = run(*arguments)
        assert (code, "Traceback" in told) == (1, False)
        assert said in told


def test_only_the_whole_key_is_accepted() -> None:
    ring, secret = KeyRing.new().add("alice")
    other = ring.add("bob")[1]
    assert ring.find(secret) is not None
    _, id_, rest = secret.split("-", 2)
    swapped = f"jenga-{other.split('-')[1]}-{rest}"
    two = KeyRing(salt_secret=ring.salt_secret, keys=ring.keys)
    for wrong in (
        "",
        "jenga",
        f"jenga-{id_}",
        f"jenga-{id_}-",
        secret[:-1],
        secret + "x",
        other,
        swapped,
        f"x-{id_}-{rest}",
    ):
        assert two.find(wrong) is None, wrong
    assert two.find("jenga-00-") is None
    again, second = KeyRing.new().add("alice")
    assert (again.keys[0].salt, second) != (ring.keys[0].salt, secret)


def test_salts_are_a_tenants_own() -> None:
    ring = KeyRing.new()
    for name, tenant in (("a", "acme"), ("b", "acme"), ("c", "other")):
        ring, _ = ring.add(name, tenant=tenant)
    a, b, c = ring.keys
    own = [ring.cache_salt(key, salt) for key in (a, c) for salt in (None, "", "x", "acme", "null")]
    own.append(ring.cache_salt(a, ring.cache_salt(c, None)))
    assert len(set(own)) == len(own)
    assert ring.cache_salt(a, "x") == ring.cache_salt(b, "x")
    elsewhere, _ = KeyRing.new().add("a", tenant="acme")
    assert elsewhere.cache_salt(elsewhere.keys[0], None) != ring.cache_salt(a, None), "not to be guessed from a name"


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"

    def add(number: int) -> None:
        with keyring.editing(file):
            ring = keyring.read(file) if file.exists() else KeyRing.new()
            keyring.write(file, ring.add(f"k{number}")[0])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(24)))
    assert len(keyring.read(file).keys) == 24
    assert os.listdir(tmp_path) == ["keys.json"]  # noqa: PTH208


def test_a_changed_file_is_followed_and_a_broken_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.json"
    ring, first = KeyRing.new().add("first")
    keyring.write(file, ring)
    live = LiveKeys(str(file))
    now = time.monotonic()
    monkeypatch.setattr(keyring.time, "monotonic", lambda: now)
    second_ring, second = ring.remove("first").add("second")
    keyring.write(file, second_ring)
    assert live.ring.find(first) is not None, "looked at a moment ago"
    now += 1.1
    assert live.ring.find(first) is None
    assert live.ring.find(second) is not None
    for breaking in (lambda: file.write_text("{"), file.unlink):
        breaking()
        now += 1.1
        assert live.ring.find(second) is not None
        assert "stay in force" in caplog.text
        caplog.clear()
    keyring.write(file, ring)
    now += 1.1
    assert live.ring.find(first) is not None


def test_keys_out_of_a_variable_and_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring, secret = KeyRing.new().add("alice")
    monkeypatch.setenv("THE_KEYS", json.dumps(ring.model_dump()))
    assert LiveKeys(variable="THE_KEYS").ring.find(secret) is not None
    with pytest.raises(KeyFileError, match="keys_variable: the variable NONE is not set"):
        LiveKeys(variable="NONE")
    twice = ring.model_dump() | {"keys": [ring.keys[0].model_dump()] * 2}
    for text, said in (("", "keys.json"), ("[]", "jenga keys"), (json.dumps(twice), "two keys have the same name")):
        (tmp_path / "keys.json").write_text(text)
        with pytest.raises(KeyFileError, match=said) as caught:
            LiveKeys(str(tmp_path / "keys.json"))
        assert ring.salt_secret not in str(caught.value)
        assert ring.keys[0].hash not in str(caught.value)


def test_quotas() -> None:
    now = 0.0
    quotas = Quotas(lambda: now)
    ring, _ = KeyRing.new().add("a", requests_per_minute=6, concurrent_requests=3)
    key = ring.keys[0]
    assert [quotas.enter(key) for _ in range(3)] == [None] * 3
    excess = quotas.enter(key)
    assert excess is not None
    assert (excess.limit, excess.retry_after_s) == ("3 requests at the same time", 1)
    for _ in range(3):
        quotas.leave(key)
    for _ in range(3):
        assert quotas.enter(key) is None, "one that was refused cost nothing"
        quotas.leave(key)
    excess = quotas.enter(key)
    assert excess is not None
    assert (excess.limit, excess.retry_after_s) == ("6 requests per minute", 10)
    now += 9.9
    assert quotas.enter(key) is not None
    now += 0.2
    assert quotas.enter(key) is None, "and then it is granted"
    quotas.leave(key)
    assert quotas.enter(key) is not None
    now += 3600
    granted = 0
    while quotas.enter(key) is None:
        quotas.leave(key)
        granted += 1
    assert granted == 6, "an hour's rest saves up a minute's worth"
    free = KeyRing.new().add("b")[0].keys[0]
    assert all(quotas.enter(free) is None for _ in range(100))
