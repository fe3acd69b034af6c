"""The Autobahn testsuite against the server's echo path, beside the bare library: `make autobahn`, see `__main__.py`."""
