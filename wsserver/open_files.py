"""How many files this process may have open, of which each connection is one. Knows no sockets."""

import sys

if sys.platform != "win32":
    import resource

# What else is open: the listener, the logs, what a model's load and a GPU's driver open.
SPARE = 256


def allow(connections: int) -> int:
    """Let this process have so many connections open and what else it needs, as far as the system lets it.

    Gives how many connections it may have.
    """
    if sys.platform == "win32":
        return connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return connections if soft == resource.RLIM_INFINITY else min(connections, soft - SPARE)
