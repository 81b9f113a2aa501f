"""Forward connections of listening sockets to the same port of the loopback.

The sockets were made outside, the process stands in another network namespace: what is accepted
comes from outside, what is connected goes inside.
"""

import asyncio
import contextlib
import socket

_CHUNK = 1 << 16


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy until the end, then say so to the other side, which may go on sending."""
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


async def _join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    with contextlib.suppress(OSError):
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            # Nobody listens inside: the peer sees its connection end.
            writer.close()
            return
        try:
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(_pump(reader, inner_writer))
                pumps.create_task(_pump(inner_reader, writer))
        except* OSError:
            pass
        finally:
            for end in (writer, inner_writer):
                end.close()


async def forward(sock: socket.socket, port: int) -> asyncio.Server:
    """Serve a listening socket until the returned server is closed."""
    return await asyncio.start_server(lambda reader, writer: _join(reader, writer, port), sock=sock)
