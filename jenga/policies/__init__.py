"""Layer types: one small policy class each, behind the interface of `jenga.policies.base`."""

from jenga.policies.attention import ChunkedLocal, FullAttention, LatentAttention, LatentIndexer, SlidingWindow
from jenga.policies.base import CachedTest, LayerPolicy, policy_class, register
from jenga.policies.budget import TokenBudget
from jenga.policies.items import CrossAttention, VisionEmbedding
from jenga.policies.recurrent import RecurrentState
from jenga.policies.scratch import Scratch

__all__ = [
    "CachedTest",
    "ChunkedLocal",
    "CrossAttention",
    "FullAttention",
    "LatentAttention",
    "LatentIndexer",
    "LayerPolicy",
    "RecurrentState",
    "Scratch",
    "SlidingWindow",
    "TokenBudget",
    "VisionEmbedding",
    "policy_class",
    "register",
]
