"""The router's names for blocks are the engine's."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.request import Request

from deployments import keys
from jenga.policies import FullAttention
from jenga.routing import GroupRule, HitRule, key_of


@pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor"])
@pytest.mark.parametrize("salt", [None, "tenant 7"])
def test_keys_are_those_of_vllms_requests(algorithm: str, salt: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    function = get_hash_fn_by_name(algorithm)
    kv_cache_utils.init_none_hash(function)
    rule = HitRule((GroupRule("full", FullAttention(), 32),), 32, 16, kv_cache_utils.NONE_HASH.hex())
    rng = random.Random(3)
    for length in (0, 15, 16, 100, 160):
        tokens = [rng.randrange(50_000) for _ in range(length)]
        request = Request(
            request_id="r",
            prompt_token_ids=tokens or [1],
            sampling_params=SamplingParams(max_tokens=1),
            pooling_params=None,
            cache_salt=salt,
            block_hasher=kv_cache_utils.get_request_block_hasher(16, function),
        )
        expected = [key_of(h) for h in request.block_hashes] if tokens else []
        assert keys.block_keys(tokens, rule, keys.hash_function(algorithm), salt) == expected
    assert keys.block_keys(tokens, rule, function, "another") != expected, "another salt, other names"


def test_clients_cannot_say_what_is_cached() -> None:
    body = SimpleNamespace(kv_transfer_params={keys.TOKEN_IDS: [1], keys.PREDICTED: {"r": 5}, "theirs": 1})
    keys.attach(body, None)
    assert body.kv_transfer_params == {"theirs": 1}
    assert keys.token_ids(body) is None
    body = SimpleNamespace(kv_transfer_params=None)
    keys.attach(body, None)
    assert body.kv_transfer_params is None
    keys.predict(body, {"r": 5})
    assert body.kv_transfer_params is None
    keys.attach(body, [1, 2])
    assert keys.token_ids(body) == [1, 2]


def test_a_prediction_reaches_its_replica_and_no_further() -> None:
    body = SimpleNamespace(kv_transfer_params=None)
    keys.attach(body, [1, 2])
    keys.predict(body, {"here": 32, "there": 64})
    params = SamplingParams(extra_args={"kv_transfer_params": body.kv_transfer_params})
    assert keys.take_prediction(params, "here") == 32
    assert params.extra_args == {}, "the engine core would take what is left for a KV connector's"
    assert keys.take_prediction(params, "here") is None
    assert keys.take_prediction(SamplingParams(), "here") is None
    odd = SamplingParams(extra_args={"kv_transfer_params": {keys.PREDICTED: "much", "theirs": 1}})
    assert keys.take_prediction(odd, "here") is None
    assert odd.extra_args == {"kv_transfer_params": {"theirs": 1}}
