"""What the commands that talk to a server share: their options, how far a request is in one line, and how it ended."""

import argparse
import math
import os
import sys
from collections.abc import Mapping

from wsserver.client import ConnectionLost, Parameters, Progress, ServerError, State
from wsserver.client.dialing import URL
from wsserver.protocol import Loading, Prefill, Queued

# How a command ends: what a shell sees of it.
OK, REFUSED, USAGE, NO_CONNECTION, CUT_OFF = 0, 1, 2, 3, 4
INTERRUPTED, TERMINATED, CLOSED_PIPE = 128 + 2, 128 + 15, 128 + 13  # as if the signal had ended it

BAR = 20  # characters
CLEAR = "\r\x1b[K"  # the line, from its beginning


def parser(command: str, description: str, epilog: str, environment: Mapping[str, str]) -> argparse.ArgumentParser:
    """Give a parser of the options that every such command has."""
    made = argparse.ArgumentParser(
        prog=f"wsserver {command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    url = environment.get("WSSERVER_URL", URL)
    made.add_argument("--url", default=url, metavar="URL", help=f"the server, also as WSSERVER_URL (default: {URL})")
    made.add_argument(
        "--key",
        default=environment.get("WSSERVER_API_KEY"),
        metavar="KEY",
        help="the server's key; better as WSSERVER_API_KEY, because others may see a command line",
    )
    made.add_argument("--model", metavar="VENDOR/MODEL", help="who answers (default: the server's default model)")
    made.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    made.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of an answer")
    made.add_argument("--temperature", type=float, metavar="X", help="0 is always the likeliest token")
    made.add_argument("--seed", type=int, metavar="N", help="draw the same answer to the same question again")
    return made


def parameters(asked: argparse.Namespace) -> Parameters:
    """Give what was said of how to answer."""
    given: Parameters = {}
    if asked.max_tokens is not None:
        given["max_tokens"] = asked.max_tokens
    if asked.temperature is not None:
        given["temperature"] = asked.temperature
    if asked.seed is not None:
        given["seed"] = asked.seed
    return given


def system(asked: argparse.Namespace) -> list[dict[str, str]]:
    """Give how a conversation begins."""
    return [{"role": "system", "content": readable(asked.system)}] if asked.system else []


def readable(text: str) -> str:
    """Give a word of the command line without what is no text in it."""
    return os.fsencode(text).decode(errors="replace")


def failure(error: ServerError | OSError) -> tuple[int, str]:
    """Give how a command ends that could not go on, and what it says to that."""
    if isinstance(error, ServerError):
        later = f"; try again in {math.ceil(error.retry_after)} s" if error.retry_after else ""
        return REFUSED, f"{error}{later}"
    if isinstance(error, ConnectionLost):
        return NO_CONNECTION, str(error)
    return NO_CONNECTION, f"the server cannot be reached: {error}; start one with `wsserver`, or name one with --url"


class Output:
    """Text on stdout, and how far a request is on stderr, in a line that is written over; nothing if that is no terminal."""

    def __init__(self) -> None:
        self._shows = sys.stderr.isatty()
        self._shown = ""
        self._unended = False  # whether the last line of the text has no end
        self._shared = sys.stdout.isatty()  # whether both are in the same place
        self._beside = False  # whether the cursor stands behind such a line

    def write(self, text: str) -> None:
        """Write text."""
        self.clear()
        sys.stdout.write(text)
        sys.stdout.flush()
        if text:
            self._unended = not text.endswith("\n")
            self._beside = self._unended and self._shared

    def end_line(self) -> None:
        """End the last line of the text."""
        self.write("\n" if self._unended else "")

    def progress(self, progress: Progress) -> None:
        """Show how far a request is."""
        match progress:
            case Queued():
                self.show(f"waiting, number {progress.position} in line")
            case Loading():
                self.show(f"loading {progress.model}: {progress.stage} {bar(progress.progress)}")
            case Prefill():
                self.show(f"reading the prompt {bar(progress.done / progress.total)}")
            case _:
                self.clear()

    def state(self, state: State) -> None:
        """Show that the connection is lost."""
        self.show("the connection is lost, trying again" if state == "reconnecting" else "")

    def show(self, line: str) -> None:
        """Write over the line that is shown."""
        if self._shows and line != self._shown:
            sys.stderr.write(("\n" if self._beside else CLEAR) + line)
            sys.stderr.flush()
            self._beside = False
        self._shown = line

    def clear(self) -> None:
        """Show nothing."""
        self.show("")


def bar(share: float) -> str:
    """Draw a share of 1."""
    full = min(max(int(share * BAR), 0), BAR)
    return f"[{'#' * full}{'.' * (BAR - full)}] {share:4.0%}"
