"""Training of the recall model: seeded, a few minutes on two CPU cores.

Sequences hold one table and many questions about it, and the loss is taken on answers only.  Lengths
grow as soon as the present one is learnt; at the end all lengths are mixed while the rate goes to zero.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jenga.demo import gemma3, recall
from jenga.demo.tokenizer import BOS, END, MODEL, SYSTEM, USER, token_id

if TYPE_CHECKING:
    from transformers import Gemma3ForCausalLM

_KEY = [token_id(key) for key in recall.KEYS]
_VALUE = [token_id(value) for value in recall.VALUES]
_EQUALS, _NEXT, _ASK, _RECITE = (token_id(mark) for mark in ("=", "; ", "? ", "! "))
_NOISE = [token_id(chr(c)) for c in range(0x20, 0x7F)]


def sequence(rng: random.Random, length: int) -> tuple[list[int], list[bool]]:
    """`length` tokens of training text, and which of them are answers (counted in the loss)."""
    chat = rng.random() < 0.6
    ids, answer = [BOS], [False]

    def add(tokens: list[int], counts: bool = False) -> None:
        ids.extend(tokens)
        answer.extend([counts] * len(tokens))

    if chat:
        if rng.random() < 0.1:
            add([SYSTEM, *rng.choices(_NOISE, k=rng.randrange(0, length // 8 + 1)), END])
        add([USER])
    if rng.random() < 0.3:
        add(rng.choices(_NOISE, k=rng.randrange(0, length // 4 + 1)))
    room = length - len(ids)
    share = rng.uniform(0.02, 0.3) if rng.random() < 0.2 else rng.uniform(0.3, 0.9)
    count = max(1, min(len(_KEY), int(room * share) // recall.TOKENS_PER_PAIR))
    pairs = [(key, rng.choice(_VALUE)) for key in rng.sample(_KEY, count)]
    for key, value in pairs:
        add([key, _EQUALS, value, _NEXT])
    order = rng.sample(range(count), count)
    while len(ids) < length:
        i = order.pop() if order else rng.randrange(count)
        recite = rng.random() < 0.15
        if recite and rng.random() < 0.5:  # short ones, so that their ends are seen too
            i = max(i, count - rng.randrange(1, 9))
        add([_RECITE if recite else _ASK, pairs[i][0], _EQUALS])
        if chat:
            add([END, MODEL])
        add([pairs[i][1]], True)
        if recite:
            for key, value in pairs[i + 1 :]:
                add([_NEXT, key, _EQUALS, value], True)
            add([_NEXT], True)
        add([END], True)
        if chat:
            add([USER])
    return ids[:length], answer[:length]


@dataclass(frozen=True)
class Stage:
    """Steps of `tokens` tokens each, in sequences of one of `lengths`; left early once `enough` of the
    answer tokens are right."""

    lengths: tuple[int, ...]
    tokens: int
    steps: int
    enough: float = 2.0


STAGES: tuple[Stage, ...] = (
    Stage((128,), 4096, 300, 0.98),
    Stage((256,), 4096, 200, 0.99),
    Stage((512,), 4096, 150, 0.995),
    Stage((1024,), 4096, 100, 0.997),
    Stage((64, 128, 256, 512, 1024, 2048, 2048), 4096, 300),
)


@dataclass(frozen=True)
class Progress:
    """Where the training stands; `accuracy` is a running mean over answer tokens, `loss` is the last."""

    step: int
    length: int
    loss: float
    accuracy: float
    seconds: float


def train(
    model: Gemma3ForCausalLM,
    seed: int,
    report: Callable[[Progress], None],
    stages: tuple[Stage, ...] = STAGES,
    rate: float = 2e-3,
) -> None:
    """Train `model` (float32) in place."""
    import torch
    from torch.nn.functional import cross_entropy

    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    begun, step = time.monotonic(), 0
    model.train()
    for number, stage in enumerate(stages):
        accuracy, last = 0.0, number == len(stages) - 1
        for i in range(stage.steps):
            length = rng.choice(stage.lengths)
            rows = [sequence(rng, length) for _ in range(max(1, stage.tokens // length))]
            ids = torch.tensor([row[0] for row in rows])
            wanted = torch.tensor([row[1] for row in rows])[:, 1:]
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 50) * ((stage.steps - i) / stage.steps if last else 1.0)
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            logits, target = model.lm_head(hidden[wanted]), ids[:, 1:][wanted]
            loss = cross_entropy(logits, target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            right = (logits.argmax(-1) == target).float().mean().item()
            accuracy = 0.8 * accuracy + 0.2 * right if i else right
            report(Progress(step, length, loss.item(), accuracy, time.monotonic() - begun))
            if i >= 20 and accuracy > stage.enough:
                break
    model.eval()  # type: ignore[no-untyped-call]


def trained_weights(seed: int, report: Callable[[Progress], None]) -> bytes:
    """A newly trained recall model's weights in bfloat16, as a safetensors file's bytes."""
    import torch
    from safetensors.torch import save

    model = gemma3.sketched(seed)
    train(model, seed, report)
    state = model.to(torch.bfloat16).state_dict()  # type: ignore[arg-type]
    state.pop("lm_head.weight", None)  # tied to the embedding
    return save({name: state[name].contiguous() for name in sorted(state)}, metadata={"format": "pt"})
