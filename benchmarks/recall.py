"""Right answers of the recall model through a real vLLM engine, greedy.

Usage: python benchmarks/recall.py [--model var/models/gemma3-recall] [--dtype bfloat16] [--questions 200]

Two engines, one after the other: one with ample KV memory, one so tight that requests are preempted.
Set JENGA=0 for stock vLLM.  Prints a table and saves it as JSON under results/.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jenga import demo
from jenga.demo import recall

# Five sliding layers of 64 tokens, one above the other, reach 5 * 63 tokens back; behind that, only the full layer.
SLIDING_REACH = 5 * 64
AMPLE_BLOCKS = 4096
# Stock vLLM makes six groups of one layer, and asks for 210 blocks before it takes one request of
# TIGHT_TOKENS; 16 requests that run to their ends would need 500 and more.
TIGHT_BLOCKS = 300
TIGHT_TOKENS = 1100


@dataclass(frozen=True)
class Case:
    """A batch of questions."""

    name: str
    pairs: int
    beyond: int = 0
    verb: recall.Verb = "?"
    share: int = 1
    """Questions asked of each table: those after the first can hit the prefix cache."""

    def questions(self, count: int) -> list[recall.Question]:
        """`count` questions, each with its asked value more than `beyond` tokens from the end."""
        if self.share == 1:
            return [recall.question(seed, self.pairs, beyond=self.beyond, verb=self.verb) for seed in range(count)]
        far = self.pairs - self.beyond // recall.TOKENS_PER_PAIR - 1
        return [
            recall.table(10_000 + i // self.share, self.pairs).ask(i % self.share * far // self.share, self.verb)
            for i in range(count)
        ]


AMPLE = (
    Case("short, 8 pairs", 8),
    Case("64 pairs", 64),
    Case("long, asked pair > 320 tokens back", 255, beyond=SLIDING_REACH),
    Case("longest, asked pair > 1,024 tokens back", len(recall.KEYS), beyond=1024),
    Case("long, 10 questions per table", 255, beyond=SLIDING_REACH, share=10),
    Case("recital, 1 to 64 pairs", 64, verb="!"),
)
TIGHT = (
    Case("tight memory: long", 255, beyond=SLIDING_REACH),
    Case("tight memory: recital > 128 tokens", 64, beyond=128, verb="!"),
)


@dataclass(frozen=True)
class Result:
    """How one case went."""

    case: str
    prompt_tokens: int
    right: int
    questions: int
    accuracy_at_least: float
    """Lower end of Wilson's 95 % interval."""
    mean_probability: float
    """Of the right first token."""
    least_probability: float
    cached_tokens: int
    preemptions: int
    seconds: float


def wilson_low(right: int, total: int) -> float:
    """Lower end of the 95 % Wilson score interval of `right` out of `total`."""
    z = 1.96
    share = right / total
    middle = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return (middle - spread) / (1 + z * z / total)


def measure(model: str, dtype: str, blocks: int, tokens: int, cases: tuple[Case, ...], count: int) -> list[Result]:
    """Run `cases` on an engine of `blocks` KV blocks and at most `tokens` tokens per request."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype=dtype,
        enforce_eager=True,
        block_size=32,
        max_model_len=tokens,
        max_num_batched_tokens=1024,
        max_num_seqs=16,
        num_gpu_blocks_override=blocks,
        enable_prefix_caching=True,
        disable_log_stats=False,
    )

    def preemptions() -> int:
        return sum(int(m.value) for m in llm.get_metrics() if m.name == "vllm:num_preemptions")

    tokenizer = llm.get_tokenizer()
    results = []
    for case in cases:
        asked = case.questions(count)
        before, begun = preemptions(), time.monotonic()
        longest = max(question.answer_tokens for question in asked)
        sampling = SamplingParams(temperature=0, max_tokens=longest + 1, logprobs=1)
        replies = llm.chat([question.messages for question in asked], sampling, use_tqdm=False)
        texts = [reply.outputs[0].text for reply in replies]
        first = [tokenizer.encode(question.answer, add_special_tokens=False)[0] for question in asked]
        probabilities = [
            math.exp(reply.outputs[0].logprobs[0][token].logprob) if token in reply.outputs[0].logprobs[0] else 0.0
            for reply, token in zip(replies, first, strict=True)
        ]
        right = sum(text == question.answer for text, question in zip(texts, asked, strict=True))
        print(f"{case.name}: {right}/{count}", flush=True)
        results.append(
            Result(
                case=case.name,
                prompt_tokens=max(len(reply.prompt_token_ids) for reply in replies),
                right=right,
                questions=count,
                accuracy_at_least=wilson_low(right, count),
                mean_probability=sum(probabilities) / count,
                least_probability=min(probabilities),
                cached_tokens=sum(reply.num_cached_tokens or 0 for reply in replies),
                preemptions=preemptions() - before,
                seconds=time.monotonic() - begun,
            )
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("var/models/gemma3-recall"))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--questions", type=int, default=200, help="per case")
    parser.add_argument("--out", type=Path, default=Path("results/recall.json"))
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Workers of the pool may not have children, so the engine's core runs inside them.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if not options.model.exists() and options.model.name in demo.NAMES:
        demo.make(options.model.name, options.model.parent)

    results: list[Result] = []
    with Console().status("measuring"):
        for blocks, tokens, cases in ((AMPLE_BLOCKS, 4096, AMPLE), (TIGHT_BLOCKS, TIGHT_TOKENS, TIGHT)):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                arguments = (str(options.model), options.dtype, blocks, tokens, cases, options.questions)
                results += pool.apply(measure, arguments)

    table = Table(title=f"{options.model.name}, {options.dtype}, greedy, JENGA={os.environ.get('JENGA', '1')}")
    for heading in (
        "case",
        "prompt tokens",
        "right",
        "accuracy (95 %: at least)",
        "p(answer) mean / least",
        "cached tokens",
        "preemptions",
        "s",
    ):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for r in results:
        table.add_row(
            r.case,
            str(r.prompt_tokens),
            f"{r.right}/{r.questions}",
            f"{r.right / r.questions:.1%} ({r.accuracy_at_least:.1%})",
            f"{r.mean_probability:.3f} / {r.least_probability:.3f}",
            str(r.cached_tokens),
            str(r.preemptions),
            f"{r.seconds:.0f}",
        )
    Console(width=150).print(table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    saved = {"model": options.model.name, "dtype": options.dtype, "results": [asdict(r) for r in results]}
    options.out.write_text(json.dumps(saved, indent=2) + "\n")


if __name__ == "__main__":
    main()
