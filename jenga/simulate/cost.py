"""What a step of the simulated engine costs.  All constants of the simulation are here."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class StepCost:
    """A roofline: a step reads the weights and the caches once, and computes every token; the host adds its time.

    The defaults are an 8B model in bfloat16 on an H100, at the shares of its peak (3.35 TB/s, 989 TFLOP/s) that
    engines commonly reach.  `benchmarks/gpu/calibrate.py` fits the host's constants to measured steps (docs/gpu.md).
    """

    overhead_s: float = 0.003
    """Launches and scheduling, in seconds a step."""
    prefill_s: float = 0.0
    """Least time of a step with prompt tokens, in seconds: its kernels are launched one by one, not as one graph."""
    request_s: float = 0.0
    """Scheduling, sampling and answering, in seconds a step for each running request."""
    weight_bytes: float = 16e9
    """Weights read in a step (of a mixture of experts: those that a full batch touches)."""
    active_parameters: float = 8e9
    """Parameters that compute one token."""
    bytes_per_s: float = 2.4e12
    """Memory bandwidth reached."""
    flops_per_s: float = 4.5e14
    """Arithmetic rate reached."""

    def step(self, tokens: float, cache_bytes: float, *, running: int = 0, prefills: bool = False) -> float:
        """Seconds of a step of `running` requests: `tokens` tokens computed, `cache_bytes` bytes of caches read."""
        compute = 2.0 * self.active_parameters * tokens / self.flops_per_s
        weights = self.weight_bytes / self.bytes_per_s
        device = max(compute, weights) + cache_bytes / self.bytes_per_s
        if prefills:
            device = max(device, self.prefill_s)
        return self.overhead_s + self.request_s * running + device

    @classmethod
    def from_json(cls, text: str) -> StepCost:
        """Constants from a JSON object; those left out keep their defaults.

        Raises:
            ValueError: not an object, an unknown name, a value that is not a number, or one that is not positive
                (`prefill_s` and `request_s` may be 0).
        """
        values = json.loads(text)
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object with some of {', '.join(sorted(known))}")
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"unknown constant {name!r}; known: {', '.join(sorted(known))}")
            least_is_zero = name in ("prefill_s", "request_s")
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and not least_is_zero):
                raise ValueError(f"{name} must be a positive number{' or 0' if least_is_zero else ''}, not {value!r}")
        return cls(**values)
