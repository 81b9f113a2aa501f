"""What a step of the simulated engine costs.  All constants of the simulation are here."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class StepCost:
    """A roofline: a step reads the weights and the caches once, and computes every token.

    The defaults are an 8B model in bfloat16 on an H100, at the shares of its peak (3.35 TB/s, 989 TFLOP/s) that
    engines commonly reach.  Measure `overhead_s` as the time of a step with one short sequence less the weights'
    read, and the two rates from a long prefill and a full decode batch.
    """

    overhead_s: float = 0.003
    """Launches and scheduling, in seconds a step."""
    weight_bytes: float = 16e9
    """Weights read in a step (of a mixture of experts: those that a full batch touches)."""
    active_parameters: float = 8e9
    """Parameters that compute one token."""
    bytes_per_s: float = 2.4e12
    """Memory bandwidth reached."""
    flops_per_s: float = 4.5e14
    """Arithmetic rate reached."""

    def step(self, tokens: float, cache_bytes: float) -> float:
        """Seconds of a step that computes `tokens` tokens and reads `cache_bytes` bytes of caches."""
        compute = 2.0 * self.active_parameters * tokens / self.flops_per_s
        weights = self.weight_bytes / self.bytes_per_s
        return self.overhead_s + max(compute, weights) + cache_bytes / self.bytes_per_s

    @classmethod
    def from_json(cls, text: str) -> StepCost:
        """Constants from a JSON object; those left out keep their defaults.

        Raises:
            ValueError: not an object, an unknown name, or a value that is not a positive number.
        """
        values = json.loads(text)
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object with some of {', '.join(sorted(known))}")
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"unknown constant {name!r}; known: {', '.join(sorted(known))}")
            if not isinstance(value, int | float) or value <= 0:
                raise ValueError(f"{name} must be a positive number, not {value!r}")
        return cls(**values)
