"""Forward connections of listening sockets to the same port of the loopback.

The sockets were made outside, the process stands in another network namespace: what is accepted
comes from outside, what is connected goes inside.
"""

import asyncio
import socket

from deployments.edge import STALLED_S
from deployments.peers import Peers

_CHUNK = 1 << 16


async def _up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy what the client sends; it may end that, and go on reading."""
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def _down(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy what the server answers."""
    while data := await reader.read(_CHUNK):
        writer.write(data)
        # Raises TimeoutError, an OSError.
        await asyncio.wait_for(writer.drain(), STALLED_S)


async def _join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    try:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        # Nobody listens inside: the peer sees its connection end.
        writer.close()
        return
    up = asyncio.create_task(_up(reader, inner_writer))
    down = asyncio.create_task(_down(inner_reader, writer))
    try:
        await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
        if not down.done() and up.exception() is None:
            await asyncio.wait({down})
    finally:
        # The server's end is the connection's: a client that keeps its half open would hold both for ever.
        for task in (up, down):
            task.cancel()
        await asyncio.gather(up, down, return_exceptions=True)
        inner_writer.transport.abort()
        writer.close()
        # Closing waits until the client has read everything.
        asyncio.get_running_loop().call_later(STALLED_S, writer.transport.abort)


async def forward(sock: socket.socket, port: int) -> asyncio.Server:
    """Serve a listening socket until the returned server is closed; raises what `Peers` does."""
    peers = Peers()

    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Behind it all connections are this machine's, which the proxy does not bound.
        host = writer.get_extra_info("peername")[0]
        if not peers.enter(host):
            writer.close()
            return
        try:
            await _join(reader, writer, port)
        finally:
            peers.leave(host)

    # As many may knock at once as uvicorn lets wait; asyncio's own 100 are soon full.
    return await asyncio.start_server(join, sock=sock, backlog=2048)
