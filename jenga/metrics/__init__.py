"""Metrics: the table of definitions, immutable snapshots of what the memory holds, exporters.  No policy in here."""

from jenga.metrics.memory import GroupMemory, LiveUse, MemorySnapshot, memory_snapshot
from jenga.metrics.samples import Observed, Sample, memory_samples

__all__ = ["GroupMemory", "LiveUse", "MemorySnapshot", "Observed", "Sample", "memory_samples", "memory_snapshot"]
