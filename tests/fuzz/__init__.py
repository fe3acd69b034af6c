"""Random and mutated messages through the codec, the session, the message handlers and the echo engine, in this process."""
