"""Messages in, tokens out: model folders, drop-ins, loading, the engine. Knows no sockets, sessions or JSON."""
