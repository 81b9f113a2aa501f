"""Layer types: one small policy class each, behind the interface of `jenga.policies.base`."""

from jenga.policies.attention import ChunkedLocal, FullAttention, LatentAttention, SlidingWindow
from jenga.policies.base import CachedTest, LayerPolicy, policy_class, register
from jenga.policies.recurrent import RecurrentState

__all__ = [
    "CachedTest",
    "ChunkedLocal",
    "FullAttention",
    "LatentAttention",
    "LayerPolicy",
    "RecurrentState",
    "SlidingWindow",
    "policy_class",
    "register",
]
