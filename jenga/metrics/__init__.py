"""Immutable snapshots of what the memory holds, and their samples for exporters.  No policy in here."""

from jenga.metrics.memory import GroupMemory, LiveUse, MemorySnapshot, memory_snapshot
from jenga.metrics.samples import Sample, samples

__all__ = ["GroupMemory", "LiveUse", "MemorySnapshot", "Sample", "memory_snapshot", "samples"]
