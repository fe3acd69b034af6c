"""`wsserver key`: makes, lists and removes the keys of a file. A running server reads it anew on SIGHUP."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from wsserver import keys_file
from wsserver.config import BadSetting

VARIABLE = "WSSERVER_API_KEYS_FILE"
SHOWN_ONCE = "this key is shown once; a running server knows it after `kill -HUP`\n"
REMOVED = "removed; a running server lets it in until `kill -HUP`, and the connections it has opened stay\n"


def run(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> None:
    """Do what the command line says; exits with a message for what cannot be."""
    given = _parser(environment.get(VARIABLE)).parse_args(arguments)
    path = Path(given.api_keys_file)
    try:
        match given.action:
            case "add":
                # The key alone goes where a script reads it.
                sys.stdout.write(keys_file.add(path, given.name) + "\n")
                sys.stderr.write(SHOWN_ONCE)
            case "list":
                sys.stdout.writelines(f"{name}\n" for name in keys_file.read(path))
            case "remove":
                keys_file.remove(path, given.name)
                sys.stderr.write(REMOVED)
    except BadSetting as error:
        sys.exit(f"wsserver key: {error}")


def _parser(file: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wsserver key", description=__doc__, allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="add, list or remove")
    told = {
        "add": "make a key, print it once, and write its hash into the file",
        "list": "print the names of the keys there are",
        "remove": "take a key out of the file",
    }
    for action, help in told.items():
        command = actions.add_parser(action, help=help, description=help, allow_abbrev=False)
        if action != "list":
            command.add_argument("name", metavar="NAME", help="whose key it is, for logs and limits")
        command.add_argument(
            "--api-keys-file", default=file, required=file is None, metavar="FILE", help=f"or {VARIABLE} in the environment"
        )
    return parser
