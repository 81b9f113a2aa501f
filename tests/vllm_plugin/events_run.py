"""One engine asked one request at a time; what its events foretell beside what it then finds in its cache.

    JENGA=0|1 python events_run.py SPEC.json RESULT.json

Three subscribers know the engine by its sockets only: one hears everything, one loses messages, one comes late to a
short replay buffer.  The engine's sockets are files.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import msgspec
import zmq
from vllm import LLM, SamplingParams
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils

from jenga.routing import AskReplay, BlockIndex, Snapshot, decode, key_of

NAME = "replica"
PATIENCE_S = 20.0
Raw = tuple[int, bytes]


class Subscriber:
    """An index and its connections, as a router has them."""

    def __init__(self, llm: LLM, folder: str, loss: float = 0.0) -> None:
        self.index = BlockIndex()
        self.replays = self.snapshots = self.lost = 0
        self.received: list[Raw] = []
        self._llm, self._folder, self._loss, self._random = llm, folder, loss, random.Random(7)
        self._context = zmq.Context.instance()
        self._live = self._context.socket(zmq.SUB)
        self._live.connect(f"ipc://{folder}/events")
        self._live.subscribe(b"")

    def catch_up(self) -> None:
        """Take all that was sent so far, and mend what is missing."""
        now = utility(self._llm, "jenga_event_stream")
        deadline = time.monotonic() + PATIENCE_S
        while True:
            while self._live.poll(0 if self._loss else 5):
                _, number, payload = self._live.recv_multipart()
                if self._random.random() < self._loss:
                    self.lost += 1
                else:
                    self._take(int.from_bytes(number, "big"), payload)
            if (self.index.due(NAME) or 0) >= now["sequence"] and self.index.epoch(NAME) in (now["epoch"], None):
                return
            if self._loss or self.index.due(NAME) is None:
                self._mend(self.index.reached(NAME, now["epoch"], now["sequence"]), now["epoch"])
            assert time.monotonic() < deadline, f"batch {self.index.due(NAME)} of {now['sequence']} never came"

    def _take(self, number: int, payload: bytes) -> None:
        batch = decode(payload)
        assert batch.epoch is not None, "a batch without its header"
        self.received.append((number, payload))
        self._mend(self.index.apply(NAME, batch.epoch, number, batch.events, batch.rule), batch.epoch)

    def _mend(self, need: Any, epoch: int) -> None:
        while need is not None:
            if isinstance(need, AskReplay):
                self.replays += 1
                self._replay(need.first)
                need = self.index.replay_ended(NAME, epoch, need.first)
            else:
                self.snapshots += 1
                need = self.index.load(NAME, Snapshot.from_dict(utility(self._llm, "jenga_cache_snapshot")))

    def _replay(self, first: int) -> None:
        with self._context.socket(zmq.DEALER) as socket:
            socket.connect(f"ipc://{self._folder}/replay")
            socket.send_multipart((b"", first.to_bytes(8, "big")))
            while True:
                assert socket.poll(PATIENCE_S * 1000), "no answer from the replay socket"
                _, _, number, payload = socket.recv_multipart()
                if int.from_bytes(number, "big", signed=True) < 0:
                    return
                batch = decode(payload)
                assert batch.epoch is not None
                self.index.apply(NAME, batch.epoch, int.from_bytes(number, "big"), batch.events, batch.rule)


def utility(llm: LLM, name: str) -> Any:
    client: Any = llm.llm_engine.engine_core
    core = getattr(client, "engine_core", None)  # there only if it is no process of its own
    return client.call_utility(name) if core is None else getattr(core, name)()


def chain(tokens: list[int], size: int) -> list[int]:
    """The index's keys of a sequence's full blocks, hashed by vLLM's own function."""
    keys, parent = [], None
    for start in range(0, len(tokens) - size + 1, size):
        parent = kv_cache_utils.hash_block_tokens(sha256, parent, tokens[start : start + size])
        keys.append(key_of(parent))
    return keys


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="kv-", ignore_cleanup_errors=True) as folder:
        result = watch(json.loads(Path(sys.argv[1]).read_text()), folder)
    Path(sys.argv[2]).write_text(json.dumps(result))


def watch(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    """Run the engine over the spec's requests; its sockets lie in `folder`."""
    llm = LLM(
        spec["model"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        disable_log_stats=False,
        kv_events_config=KVEventsConfig(
            enable_kv_cache_events=True,
            publisher="zmq",
            endpoint=f"ipc://{folder}/events",
            replay_endpoint=f"ipc://{folder}/replay",
            buffer_steps=spec["buffer"],
        ),
        **spec["engine"],
    )
    kv_cache_utils.init_none_hash(sha256)
    faithful, lossy = Subscriber(llm, folder), Subscriber(llm, folder, loss=spec["loss"])
    time.sleep(1)  # subscriptions take effect without an answer
    late: Subscriber | None = None

    rng = random.Random(spec["seed"])
    vocabulary, longest = spec["vocabulary"], spec["engine"]["max_model_len"]
    themes = [[rng.randrange(5, vocabulary) for _ in range(longest)] for _ in range(spec["themes"])]
    told: list[list[int]] = []  # conversations so far
    rows = []
    for number in range(spec["requests"]):
        if told and rng.random() < 0.4:
            start = rng.choice(told[-20:])
        else:
            start = rng.choice(themes)[: rng.randrange(8, longest * 2 // 3)]
        prompt = start[: longest * 2 // 3] + [
            rng.randrange(5, vocabulary) for _ in range(rng.randrange(1, longest // 6))
        ]
        if number == spec["requests"] // 2:
            late = Subscriber(llm, folder)
        foretold = []
        for subscriber in (faithful, lossy, late):
            if subscriber is None:
                continue
            subscriber.catch_up()
            rule = subscriber.index.rule(NAME)
            keys = chain(prompt, rule.hash_tokens) if rule else []
            foretold.append(subscriber.index.hits(keys, len(prompt))[NAME].tokens if rule else 0)
        sampling = SamplingParams(
            temperature=0,
            max_tokens=rng.choice((1, 3, 35)),
            ignore_eos=True,
            detokenize=False,
            extra_args={"kv_cache_report_mode": "full"} if number % 7 == 0 else None,
        )
        (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        rows.append({"foretold": foretold, "actual": output.num_cached_tokens})
        told.append(prompt + list(output.outputs[0].token_ids))

    assert late is not None
    subscribers = (faithful, lossy, late)
    for subscriber in subscribers:
        subscriber.catch_up()
    rule = faithful.index.rule(NAME)
    assert rule is not None
    positions = {key: index for tokens in told for index, key in enumerate(chain(tokens, rule.hash_tokens))}
    truth = Snapshot.from_dict(utility(llm, "jenga_cache_snapshot"))
    memory = utility(llm, "jenga_memory")
    batches = [msgspec.msgpack.decode(payload, type=KVEventBatch) for _, payload in faithful.received]
    stock = msgspec.msgpack.Decoder()
    misplaced = sparse = reports = merged = empty = 0
    for _, payload in faithful.received:
        for event in stock.decode(payload)[1][1:]:
            empty += not event.get("block_hashes", True)
            merged += event["type"] == "BlockRemoved" and len(event["block_hashes"]) > 1
            if event["type"] != "BlockStored":
                continue
            reports += event.get("copies", 1) == 0
            pairs = list(zip(event["block_indices"], event["block_hashes"], strict=True)) if memory else []
            sparse += len(event["block_hashes"]) * event["block_size"] < len(event["token_ids"])
            per_page = rule.groups[event["group_idx"]].page_tokens // rule.hash_tokens
            misplaced += sum(positions[key] != (index + 1) * per_page - 1 for index, key in pairs)
    result: dict[str, Any] = {
        "rows": rows,
        "rule": rule.to_dict(),
        "root": kv_cache_utils.NONE_HASH.hex(),
        "jenga": memory is not None,
        "evicted": memory["counters"]["evicted_pages"] if memory else None,
        "agree": [same(s.index.contents(NAME), truth) for s in subscribers],
        "copies": sum(len(group.copies) for group in truth.groups),
        "pages": [len(group.blocks) for group in truth.groups],
        "replays": [s.replays for s in subscribers],
        "snapshots": [s.snapshots for s in subscribers],
        "lost": lossy.lost,
        "inconsistent": [s.index.stats().inconsistent for s in subscribers],
        "stock_batches": len(batches),
        "stock_stored": sum(isinstance(event, BlockStored) for batch in batches for event in batch.events),
        "stock_removed": sum(
            len(event.block_hashes) for batch in batches for event in batch.events if isinstance(event, BlockRemoved)
        ),
        "misplaced": misplaced,
        "sparse": sparse,
        "reports": reports,
        "merged": merged,
        "empty": empty,
    }
    result["reset"] = llm.reset_prefix_cache()
    deadline = time.monotonic() + PATIENCE_S  # no request will follow that could carry the news
    while faithful._live.poll(max(0.0, deadline - time.monotonic()) * 1000):
        _, number_, payload = faithful._live.recv_multipart()
        faithful._take(int.from_bytes(number_, "big"), payload)
        if not any(group.blocks for group in faithful.index.contents(NAME).groups):
            break
    result["left_after_reset"] = sum(len(group.blocks) for group in faithful.index.contents(NAME).groups)
    return result


def same(believed: Snapshot, truth: Snapshot) -> bool:
    """Whether two snapshots hold the same blocks, copies included, at the same point of the stream."""
    groups = max(len(believed.groups), len(truth.groups))

    def plain(snapshot: Snapshot) -> list[Any]:
        rows = [(sorted(group.blocks), sorted(group.copies.items())) for group in snapshot.groups]
        return [snapshot.sequence, *rows, *([([], [])] * (groups - len(rows)))]

    return plain(believed) == plain(truth)


if __name__ == "__main__":
    main()
