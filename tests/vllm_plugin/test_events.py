"""KV events: what a subscriber can foretell from them alone, and that vLLM's own readers still read them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch

from jenga.demo import make
from jenga.routing import decode
from jenga.vllm_plugin.events import PlacedBlockStored, StreamHeader, compact

RUNNER = Path(__file__).with_name("events_run.py")
MEBIBYTES = {"gemma3-recall": 7.0, "granite-hybrid": 8.0, "one-type": 1.0}
"""KV memory: a handful of prompts, so that most of what is cached is evicted again."""
REQUESTS = {"gemma3-recall": 120, "granite-hybrid": 120, "one-type": 40}


def one_type(folder: Path) -> Path:
    """A model whose layers are all alike: vLLM's own manager stays in charge, only the stream is ours."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def watched(model: Path, name: str, folder: Path) -> dict[str, Any]:
    """An engine's requests as foretold and as they were."""
    spec, result = folder / "spec.json", folder / "result.json"
    spec.write_text(
        json.dumps(
            {
                "model": str(model),
                "requests": REQUESTS[name],
                "seed": 3,
                "vocabulary": 200,
                "themes": 6,
                "buffer": 40,
                "loss": 0.05,
                "engine": {
                    "dtype": "float32",
                    "max_model_len": 480,
                    "block_size": 32,
                    "kv_cache_memory_bytes": int(MEBIBYTES[name] * 2**20),
                    "enable_prefix_caching": True,
                    "max_num_batched_tokens": 200,
                    "max_num_seqs": 4,
                },
            }
        )
    )
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(spec), str(result)],
        # Where the engine core is a process of its own, what it answers travels too; once is enough.
        env={**os.environ, "JENGA": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(name == "one-type"))},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    outcome: dict[str, Any] = json.loads(result.read_text())
    return outcome


@pytest.mark.parametrize("name", REQUESTS)
def test_events_alone_foretell_every_hit(name: str, tmp_path: Path) -> None:
    model = one_type(tmp_path / name) if name == "one-type" else make(name, tmp_path)
    seen = watched(model, name, tmp_path)
    wrong = [(number, row) for number, row in enumerate(seen["rows"]) if set(row["foretold"]) != {row["actual"]}]
    assert wrong == [], "foretold by the faithful, the lossy and (in the second half) the late subscriber"
    hits = [row["actual"] for row in seen["rows"] if row["actual"]]
    assert len(hits) > REQUESTS[name] / 5, "hardly a hit, so hardly a test"
    assert len(set(hits)) > 3
    # What each subscriber believes in the end is what the engine has, page for page.
    assert seen["agree"] == [True, True, True]
    assert seen["inconsistent"] == [0, 0, 0]
    assert seen["stock_removed"] > 3 * sum(seen["pages"]), "no eviction to speak of"
    assert seen["lost"] > 0
    assert seen["replays"][0] == 0 < seen["replays"][1]
    assert seen["snapshots"][2] >= 1, "the late one came before anything was out of reach"
    # The wire: vLLM's readers took every batch; the router can check that it hashes alike.
    assert seen["stock_stored"] > REQUESTS[name]
    assert seen["rule"]["root"] == seen["root"]
    assert seen["reports"] > 0 or not seen["jenga"]
    assert seen["misplaced"] == seen["empty"] == 0
    # A reset is told at once, and not with the next request.
    assert seen["reset"] is True
    assert seen["left_after_reset"] == 0
    assert seen["jenga"] is (name != "one-type")
    if seen["jenga"]:
        assert min(seen["evicted"]) > 30, "every group was under pressure"
        assert seen["sparse"] > 0
        assert seen["merged"] > 0


def stored(group: int, *hashes: int, cls: type[BlockStored] = BlockStored, **more: Any) -> BlockStored:
    return cls(
        block_hashes=list(hashes),
        parent_block_hash=None,
        token_ids=list(range(16 * len(hashes))),
        block_size=16,
        lora_id=None,
        medium="GPU",
        lora_name=None,
        group_idx=group,
        **more,
    )


def removed(group: int, *hashes: int, medium: str = "GPU") -> BlockRemoved:
    return BlockRemoved(block_hashes=list(hashes), medium=medium, group_idx=group)


def test_vllms_own_reader_reads_what_we_send_and_sees_what_stock_would_have_sent() -> None:
    header = StreamHeader(block_hashes=[], medium=None, stream={"epoch": 7})
    ours = stored(1, 3, 4, cls=PlacedBlockStored, block_indices=[5, 9], copies=0)
    payload = msgspec.msgpack.encode(KVEventBatch(ts=2.0, events=[header, ours, AllBlocksCleared()]))
    read = msgspec.msgpack.decode(payload, type=KVEventBatch)
    assert read.events == [BlockRemoved(block_hashes=[], medium=None), stored(1, 3, 4), AllBlocksCleared()]
    batch = decode(payload)
    assert (batch.time, batch.epoch, batch.rule) == (2.0, 7, None)
    assert [event.block_hashes for event in batch.events[:1]] == [[3, 4]]
    assert batch.events[0].copies == 0
    # And ours reads what stock sends.
    plain = decode(msgspec.msgpack.encode(KVEventBatch(ts=3.0, events=[stored(0, 8), removed(0, 8)])))
    assert plain.epoch is None
    assert [(e.block_hashes, e.group_idx, getattr(e, "copies", None)) for e in plain.events] == [
        ([8], 0, 1),
        ([8], 0, None),
    ]


def test_neighbouring_removals_travel_together_and_order_is_kept() -> None:
    first, last = stored(0, 1), stored(0, 2)
    events = compact(
        [
            removed(0, 1),
            removed(0, 2),
            removed(1, 3),
            removed(1, 4, medium="CPU"),
            first,
            stored(1),  # every block of it was left out
            removed(1, 5),
            AllBlocksCleared(),
            last,
        ]
    )
    assert events == [
        removed(0, 1, 2),
        removed(1, 3),
        removed(1, 4, medium="CPU"),
        first,
        removed(1, 5),
        AllBlocksCleared(),
        last,
    ]
