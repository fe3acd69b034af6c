"""Which models are loaded, for whom, and which leave. Knows no frames and no connections."""
