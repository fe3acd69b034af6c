"""The Python client: `async with connect(url) as server: async for token in server.generate(prompt=...)`."""

from wsserver.client.client import Answer, Client, connect
from wsserver.client.connection import State
from wsserver.client.messages import ConnectionLost, Done, Parameters, Progress, ServerError

__all__ = ["Answer", "Client", "ConnectionLost", "Done", "Parameters", "Progress", "ServerError", "State", "connect"]
