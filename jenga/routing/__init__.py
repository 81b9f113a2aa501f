"""What a router knows of its engines' prefix caches: an index fed by KV events alone.

No Ray and no vLLM in here: a transport hands over encoded batches and does what the index asks for.
"""

from jenga.routing.events import Batch, Snapshot, decode, key_of
from jenga.routing.index import AskReplay, AskSnapshot, BlockIndex, IndexStats
from jenga.routing.rule import GroupRule, HitRule

__all__ = [
    "AskReplay",
    "AskSnapshot",
    "Batch",
    "BlockIndex",
    "GroupRule",
    "HitRule",
    "IndexStats",
    "Snapshot",
    "decode",
    "key_of",
]
