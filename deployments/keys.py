"""What a request's prompt is called in the engines' caches: its token ids and the hashes of its blocks.

Chat template and tokeniser run once, in the ingress; the ids travel with the request (vLLM's
``kv_transfer_params.prompt_token_ids``), so that no engine does it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import BlockHash, hash_block_tokens

from jenga.routing import HitRule, key_of

TOKEN_IDS = "prompt_token_ids"
PREDICTED = "jenga_predicted_tokens"
"""Key under which a request tells the replica what the router expects to be cached: replica -> tokens."""


def block_keys(
    tokens: Sequence[int], rule: HitRule, hash_function: Callable[[Any], bytes], salt: str | None
) -> list[int]:
    """The index's keys of all whole blocks of a prompt, as the engines name them.

    `salt` is the request's ``cache_salt``.  Costs one hash per block.
    """
    size = rule.hash_tokens
    parent = BlockHash(bytes.fromhex(rule.root))
    extra: tuple[Any, ...] | None = (("cache_salt", salt),) if salt else None
    keys = []
    for start in range(0, len(tokens) - size + 1, size):
        parent = hash_block_tokens(hash_function, parent, tokens[start : start + size], extra)
        keys.append(key_of(parent))
        extra = None
    return keys


def hash_function(name: str) -> Callable[[Any], bytes]:
    """vLLM's block hash algorithm `name` (engine argument ``prefix_caching_hash_algo``)."""
    function: Callable[[Any], bytes] = get_hash_fn_by_name(name)
    return function


def token_ids(body: object) -> list[int] | None:
    """The token ids that the ingress has put into a request, None if it has not."""
    params = getattr(body, "kv_transfer_params", None)
    ids = params.get(TOKEN_IDS) if isinstance(params, dict) else None
    return ids if isinstance(ids, list) else None


def attach(body: Any, ids: list[int] | None) -> None:
    """Put token ids into a request; what a client wrote there is dropped, since only we may say what is cached."""
    params = {k: v for k, v in (body.kv_transfer_params or {}).items() if k not in (TOKEN_IDS, PREDICTED)}
    if ids is not None:
        params[TOKEN_IDS] = ids
    body.kv_transfer_params = params or None


def predict(body: Any, expected: dict[str, int]) -> None:
    """Tell the replica that will have this request what was expected of it."""
    if isinstance(body.kv_transfer_params, dict):
        body.kv_transfer_params[PREDICTED] = expected


def take_prediction(params: Any, replica: str) -> int | None:
    """Remove the expectation from a request's sampling parameters, and what it says of this replica, in tokens."""
    extra = getattr(params, "extra_args", None)
    transfer = extra.get("kv_transfer_params") if isinstance(extra, dict) else None
    if not isinstance(transfer, dict):
        return None
    transfer.pop(TOKEN_IDS, None)  # vLLM takes them from chats only; the engine core has no use for them
    expected = transfer.pop(PREDICTED, None)
    if not transfer:
        del extra["kv_transfer_params"]
    predicted = expected.get(replica) if isinstance(expected, dict) else None
    return predicted if isinstance(predicted, int) else None
