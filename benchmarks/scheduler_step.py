"""Times vLLM's scheduler on its own memory manager and on Jenga's, in one process.

    python benchmarks/scheduler_step.py [--models NAME ...] [--requests 16 64 256 512] [--json FILE]

One step is `Scheduler.schedule()` and `Scheduler.update_from_output()` with fixed sampled tokens in the model's place:
all that vLLM's scheduler does on the CPU between two forward passes.  Always the same number of requests runs; as one
ends (64 to 192 tokens after its prompt of 1,024, half of which it shares with others), the next one arrives.  Prefix
caching is on, the memory holds half as much again as the requests need, and the rest is cached: every arrival evicts.
The two schedulers take turns step by step, each with the same requests, and processor time is counted: what else the
machine does hits both alike.

A model is one of the zoo (`configs/models`) or of the demo models, planned for a GPU's pages of 16 tokens; vLLM's own
plan enlarges them where it must.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(JENGA="0", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")  # installed below, beside vLLM's own
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash, resolve_kv_cache_block_sizes
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from jenga.demo import catalogue
from jenga.hf_config import from_hf_config
from jenga.layers import LayerType
from jenga.models import ModelSpec, load_model
from jenga.policies import ChunkedLocal, LatentAttention, SlidingWindow
from jenga.strategies import make_plan
from jenga.vllm_plugin import adapter
from jenga.vllm_plugin.config import JengaKVCacheConfig

DEMO = (catalogue.RECALL, catalogue.GRANITE, catalogue.QWEN3_NEXT)
MODELS = ("gemma-3-27b", "falcon-h1-34b", "qwen3-next-80b", *DEMO)
PAGE_TOKENS = 16
PROMPT, SHARED, FAMILIES = 1024, 512, 8
OUTPUT = (64, 192)
MAX_LEN, BATCHED_TOKENS = 4096, 8192
SLACK = 1.5
WARM_STEPS = 120
SAMPLED = 7
SIDES = ("vllm", "jenga")


@dataclass(frozen=True)
class Figure:
    """Median over repeats, with the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Figure:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int) -> str:
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f} to {self.high:,.{digits}f})"


# -- the two plans of a model ---------------------------------------------------------------------------------------


class Planner:
    """Plans both ways; `adapter.install` replaces functions, so vLLM's own are kept aside first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.own = (kv_cache_utils.get_kv_cache_groups, kv_cache_utils.get_kv_cache_config_from_groups)
        methods = dict(vars(Scheduler))
        adapter.install()
        replaced = {name: method for name, method in methods.items() if vars(Scheduler)[name] is not method}
        self.scheduler_types = {"vllm": type("StockScheduler", (Scheduler,), replaced), "jenga": Scheduler}
        self.replaced = (kv_cache_utils.get_kv_cache_groups, kv_cache_utils.get_kv_cache_config_from_groups)

    def model(self, name: str) -> ModelSpec:
        return from_hf_config(catalogue.make(name, self.folder)) if name in catalogue.NAMES else load_model(name)

    def plan(self, model: ModelSpec, requests: int, jenga: bool) -> tuple[VllmConfig, KVCacheConfig]:
        """One of the two plans, with the same memory."""
        types = model.layer_types()
        tokens = PROMPT + OUTPUT[1]
        stock = make_plan("vllm", model.name, types, 1 << 40)
        memory = int(SLACK * requests * sum(stock.pages(tokens)) * stock.large_page_bytes) + (1 << 30)
        state = any(t.is_state for t in types)
        block = stock.hit_tokens if state and not jenga else PAGE_TOKENS
        config = self.config(requests, block, state)
        groups_of, plan = self.replaced if jenga else self.own
        planned = plan(config, groups_of(config, specs(types, block, padded=not jenga)), memory)
        assert isinstance(planned, JengaKVCacheConfig) is jenga, f"{model.name} is not managed"
        return config, planned

    def scheduler(self, model: ModelSpec, requests: int, jenga: bool) -> tuple[Scheduler, int]:
        """A scheduler on one of the two plans, and the tokens per hash of a prompt."""
        config, planned = self.plan(model, requests, jenga)
        config.cache_config.num_gpu_blocks = planned.num_blocks
        scheduler_block, hash_block = resolve_kv_cache_block_sizes(planned, config)
        scheduler = self.scheduler_types["jenga" if jenga else "vllm"](
            vllm_config=config,
            kv_cache_config=planned,
            structured_output_manager=StructuredOutputManager(config),
            block_size=scheduler_block,
            hash_block_size=hash_block,
            log_stats=True,
        )
        return scheduler, hash_block

    def config(self, requests: int, block: int, state: bool) -> VllmConfig:
        """vLLM's configuration of a demo model; of the model itself the scheduler asks nothing but its lengths."""
        carrier = catalogue.make(catalogue.GRANITE if state else catalogue.RECALL, self.folder)
        config = EngineArgs(
            model=str(carrier),
            skip_tokenizer_init=True,
            enforce_eager=True,
            hf_overrides={"max_position_embeddings": MAX_LEN},
            max_model_len=MAX_LEN,
            max_num_seqs=requests,
            max_num_batched_tokens=BATCHED_TOKENS,
            enable_prefix_caching=True,
            async_scheduling=False,
        ).create_engine_config()
        cache = config.cache_config
        cache.block_size, cache.kv_cache_layout = block, "LBNHC"
        if state:
            cache.mamba_cache_mode, cache.mamba_block_size = "align", block
        return config


def specs(types: tuple[LayerType, ...], block: int, padded: bool) -> dict[str, KVCacheSpec]:
    """One spec per layer, as vLLM's modules make them; `padded` states are as big as an attention page."""
    made: dict[str, KVCacheSpec] = {}
    page = max((t.page_bytes(block) for t in types if not t.is_state), default=0)
    for kind in types:
        made.update({f"{kind.name}.{i}": spec_of(kind, block, page if padded else None) for i in range(kind.layers)})
    return made


def spec_of(kind: LayerType, block: int, state_page: int | None) -> KVCacheSpec:
    if kind.is_state:
        return MambaSpec(
            block_size=block,
            shapes=((kind.state_bytes,),),
            dtypes=(torch.int8,),
            page_size_padded=state_page,
            mamba_cache_mode="align",
        )
    if isinstance(kind.policy, LatentAttention):
        return MLAAttentionSpec(block_size=block, num_kv_heads=1, head_size=kind.cell_bytes // 2, dtype=torch.bfloat16)
    heads, size, value_size = kind.shape
    shape: dict[str, Any] = {
        "block_size": block,
        "num_kv_heads": heads,
        "head_size": size,
        "head_size_v": value_size,
        "dtype": torch.bfloat16,
    }
    if isinstance(kind.policy, SlidingWindow):
        return SlidingWindowSpec(sliding_window=kind.policy.window, **shape)
    if isinstance(kind.policy, ChunkedLocal):
        return ChunkedLocalAttentionSpec(attention_chunk_size=kind.policy.chunk, **shape)
    return FullAttentionSpec(**shape)


# -- steps ----------------------------------------------------------------------------------------------------------


class Engine:
    """A scheduler with a full house of requests and no model."""

    def __init__(self, scheduler: Scheduler, hash_block: int, requests: int, seed: int) -> None:
        self.scheduler = scheduler
        self.requests = requests
        self.random = random.Random(seed)
        self.hasher = get_request_block_hasher(hash_block, sha256)
        self.families = [self.tokens(SHARED) for _ in range(FAMILIES)]
        self.count = self.hit_tokens = 0

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(10, 200) for _ in range(count)]

    def request(self) -> Request:
        self.count += 1
        return Request(
            request_id=str(self.count),
            prompt_token_ids=self.random.choice(self.families) + self.tokens(PROMPT - SHARED),
            sampling_params=SamplingParams(max_tokens=self.random.randint(*OUTPUT)),
            pooling_params=None,
            block_hasher=self.hasher,
        )

    def arrive(self) -> None:
        for _ in range(self.requests - len(self.scheduler.requests)):
            self.scheduler.add_request(self.request())

    def step(self) -> tuple[float, float]:
        """Microseconds of processor time for scheduling, and for taking the sampled tokens in."""
        self.arrive()
        begin = time.thread_time()
        scheduled = self.scheduler.schedule()
        middle = time.thread_time()
        output = self.sample(scheduled)
        resume = time.thread_time()
        taken = self.scheduler.update_from_output(scheduled, output)
        end = time.thread_time()
        assert not scheduled.preempted_req_ids, "the memory is too small for the requests"
        self.hit_tokens += sum(
            o.scheduler_stats.prefix_cache_stats.hits for o in taken.values() if o.scheduler_stats is not None
        )
        return (middle - begin) * 1e6, (end - resume) * 1e6

    def sample(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        """One token for every request whose prompt is through."""
        ids = list(scheduled.num_scheduled_tokens)
        running = self.scheduler.requests
        tokens = [[SAMPLED] if running[i].num_computed_tokens >= running[i].num_prompt_tokens else [] for i in ids]
        return ModelRunnerOutput(ids, {name: n for n, name in enumerate(ids)}, sampled_token_ids=tokens)


def measure(planner: Planner, model: ModelSpec, requests: int, steps: int, seed: int) -> dict[str, dict[str, float]]:
    """Mean microseconds per step by side and part; both sides in turns."""
    engines = {
        side: Engine(*planner.scheduler(model, requests, side == "jenga"), requests=requests, seed=seed)
        for side in SIDES
    }
    fill = requests * PROMPT // BATCHED_TOKENS
    for _ in range(fill + WARM_STEPS):
        for engine in engines.values():
            engine.step()
    spent = {side: [0.0, 0.0] for side in SIDES}
    before = {side: engine.hit_tokens for side, engine in engines.items()}
    gc.collect()
    gc.disable()
    for number in range(steps):
        for side in SIDES if number % 2 else SIDES[::-1]:
            for part, microseconds in enumerate(engines[side].step()):
                spent[side][part] += microseconds / steps
    gc.enable()
    return {
        side: {
            "step": schedule + update,
            "schedule": schedule,
            "update": update,
            "hit tokens": engines[side].hit_tokens - before[side],
        }
        for side, (schedule, update) in spent.items()
    }


# -- report ---------------------------------------------------------------------------------------------------------


def summary(runs: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Figures over repeats; the ratio is taken run by run, since both sides of a run met the same requests."""
    ratio = Figure.of([run["jenga"]["step"] / run["vllm"]["step"] for run in runs])
    sides = {
        side: {part: vars(Figure.of([run[side][part] for run in runs])) for part in runs[0][side]} for side in SIDES
    }
    return {**sides, "ratio": vars(ratio)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--requests", type=int, nargs="+", default=[16, 64, 256, 512])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("results/scheduler_step.json"))
    arguments = parser.parse_args()
    init_none_hash(sha256)
    table = Table("model", "groups", "requests", "vLLM 0.32, µs", "Jenga, µs", "Jenga / vLLM", "hit tokens")
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "steps": arguments.steps,
        "repeats": arguments.repeats,
        "unit": "microseconds of processor time per step: median, lowest and highest of the repeats' means",
        "models": {},
    }
    with tempfile.TemporaryDirectory() as folder, Progress(transient=True) as progress:
        planner = Planner(Path(folder))
        bar = progress.add_task("", total=len(arguments.models) * len(arguments.requests) * arguments.repeats)
        for name in arguments.models:
            model = planner.model(name)
            groups = [len(planner.plan(model, 1, side == "jenga")[1].kv_cache_groups) for side in SIDES]
            rows = report["models"][name] = {"groups": dict(zip(SIDES, groups, strict=True)), "requests": {}}
            for requests in arguments.requests:
                runs = []
                for seed in range(arguments.repeats):
                    progress.update(bar, description=f"{name}, {requests} requests")
                    runs.append(measure(planner, model, requests, arguments.steps, seed))
                    progress.advance(bar)
                row = rows["requests"][str(requests)] = summary(runs)
                table.add_row(
                    name if requests == arguments.requests[0] else "",
                    f"{groups[0]} / {groups[1]}",
                    str(requests),
                    *(Figure(**row[side]["step"]).text(0) for side in SIDES),
                    Figure(**row["ratio"]).text(2),
                    " / ".join(f"{row[side]['hit tokens']['median']:,.0f}" for side in SIDES),
                )
            table.add_section()
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    console = Console(width=160)
    console.print(table)
    console.print(f"saved as {arguments.json}")


if __name__ == "__main__":
    main()
