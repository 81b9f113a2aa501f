"""Load for the demo's replicas: chats about shared tables, long answers that fill the memory, and odd requests."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from jenga.demo import recall

MODEL = "gemma3-recall"
# More tables than the replicas' memory holds, some asked about far more often than others.
_TABLES = 40
_PAIRS = 130


@dataclass
class Load:
    """Clients in threads, until stopped; what they got is counted by status."""

    url: str
    clients: int = 20
    statuses: dict[int, int] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Load:
        self._pool = ThreadPoolExecutor(self.clients + 1)
        self._jobs = [self._pool.submit(self._client, number) for number in range(self.clients)]
        self._jobs.append(self._pool.submit(self._odd))
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        for job in self._jobs:
            job.result()

    def _client(self, number: int) -> None:
        rng = random.Random(number)
        with httpx.Client(base_url=self.url, timeout=300, trust_env=False) as http:
            while not self._stop.is_set():
                table = recall.table(int(rng.paretovariate(0.7)) % _TABLES, _PAIRS)
                asked = table.ask(rng.randrange(_PAIRS))
                long = rng.random() < 0.3
                body = {"messages": asked.messages, "max_tokens": 300 if long else 4, "ignore_eos": long}
                self._post(http, "/v1/chat/completions", body)

    def _odd(self) -> None:
        """What is placed by load alone (several prompts), and what is refused (too long)."""
        with httpx.Client(base_url=self.url, timeout=300, trust_env=False) as http:
            while not self._stop.wait(5):
                self._post(http, "/v1/completions", {"prompt": ["a1=1; ? a1=", "b2=2; ? b2="], "max_tokens": 2})
                self._post(http, "/v1/completions", {"prompt": [7] * 5000, "max_tokens": 1})

    def _post(self, http: httpx.Client, path: str, body: dict[str, Any]) -> None:
        try:
            status = http.post(path, json={"model": MODEL, "temperature": 0, **body}).status_code
        except httpx.HTTPError:
            # A replica that is killed takes its requests with it.
            status = 0
            time.sleep(0.5)
        with self._lock:
            self.statuses[status] = self.statuses.get(status, 0) + 1
