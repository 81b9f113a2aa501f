"""The first question to a deployment: of a model that knows it, one whose right answer is known."""

import json
import time
from dataclasses import dataclass
from typing import Any

import httpx

from deployments import tls
from deployments.config import Serving
from deployments.local.record import API_KEY

PATH = "/v1/chat/completions"


class NoAnswerError(Exception):
    """The deployment did not answer; the message is for the user."""


@dataclass(frozen=True)
class Answer:
    """One request and what came back; ``right`` is the right answer, None where nobody knows it."""

    path: str
    request: dict[str, Any]
    response: dict[str, Any]
    seconds: float
    right: str | None
    with_key: bool = False
    certificate: str | None = None

    @property
    def text(self) -> str:
        """What the model said."""
        return str(self.response["choices"][0]["message"]["content"] or "")

    def curl(self, base: str) -> str:
        """The request as a command; a key stands there as the variable that holds it."""
        trust = f" --cacert {self.certificate}" if self.certificate else ""
        key = f' -H "Authorization: Bearer ${API_KEY}"' if self.with_key else ""
        return (
            f"curl -s{trust} {base}{self.path} -H 'Content-Type: application/json'{key} \\\n"
            f"  -d '{json.dumps(self.request)}'"
        )


def ask(base: str, serving: Serving, *, key: str | None = None, certificate: str | None = None) -> Answer:
    """Ask the deployment at ``base`` (URL) something short; ``key`` is an API key, if it wants one.

    ``certificate`` is the file of the certificate to trust, None without TLS.

    Raises NoAnswerError when nothing comes back, or an error.
    """
    text, right = "Hello", None
    if serving.model.demo == "gemma3-recall":
        from jenga.demo.recall import question

        asked = question(seed=0, pairs=16)
        text, right = asked.text, asked.answer
    request = {
        "model": serving.model.id,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 8,
        "temperature": 0,
    }
    begin = time.monotonic()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    context = tls.client_context(certificate)
    # Never through a proxy: the address is this machine's or the cluster's.
    with httpx.Client(base_url=base, timeout=120, trust_env=False, headers=headers, verify=context) as client:
        try:
            response = client.post(PATH, json=request)
        except httpx.HTTPError as error:
            raise NoAnswerError(f"{base} does not answer: {error}") from None
    if not response.is_success:
        raise NoAnswerError(f"the first request failed with status {response.status_code}: {response.text[:500]}")
    return Answer(PATH, request, response.json(), time.monotonic() - begin, right, key is not None, certificate)
