"""The process behind a local deployment: stands in the new network namespace, forwards ports, keeps Ray.

Started by `jenga serve` with its orders as JSON on the command line; ends when told to (SIGTERM) or
when Ray ends, and takes everything with it.
"""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from deployments.local import isolation
from deployments.local.forwarder import forward

# Longer than the first process takes to end its family (twice its grace).
_STOP_S = 15.0


@dataclass(frozen=True)
class Orders:
    """command: Ray's; listeners: inherited sockets' file descriptors by port; isolated: with namespaces."""

    command: list[str]
    listeners: dict[str, int]
    isolated: bool

    def to_argument(self) -> str:
        """As one argument of the command line."""
        return json.dumps(asdict(self))


async def supervise(orders: Orders) -> int:
    """Keep Ray until it ends or this process is told to; returns Ray's exit code."""
    if orders.isolated:
        isolation.bring_up_loopback()
    prefix = isolation.process_command() if orders.isolated else []
    init = [*prefix, sys.executable, "-m", "deployments.local.init", *orders.command]
    ray = await asyncio.create_subprocess_exec(*init, stdin=subprocess.PIPE)
    servers: list[Any] = []
    for port, descriptor in orders.listeners.items():
        servers.append(await forward(socket.socket(fileno=descriptor), int(port)))

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    ended = asyncio.create_task(ray.wait())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
    for server in servers:
        server.close()
    if not ended.done():
        assert ray.stdin is not None
        ray.stdin.close()
        try:
            await asyncio.wait_for(asyncio.shield(ended), _STOP_S)
        except TimeoutError:
            # `unshare --kill-child` takes the namespace along.
            with contextlib.suppress(ProcessLookupError):
                ray.kill()
    return await ended


def main() -> int:
    """Entry point of the process."""
    return asyncio.run(supervise(Orders(**json.loads(sys.argv[1]))))


if __name__ == "__main__":
    sys.exit(main())
