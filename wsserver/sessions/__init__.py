"""One client, whatever it speaks through. Knows no sockets and no models."""
