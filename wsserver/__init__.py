"""One peer over a WebSocket: the protocol, the session, the outbox, the socket. Knows nothing about models."""

__version__ = "0.1.0"
