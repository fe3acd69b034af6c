"""What downloads need beside the hub's own library. Knows no models, and nothing of a running server."""
