"""A real server process, real clients, and a bad network between them."""
