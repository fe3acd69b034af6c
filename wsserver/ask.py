"""`wsserver ask`: one question, and its answer on stdout as it comes. Everything else is said on stderr."""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence

from wsserver import shell
from wsserver.client import ServerError, connect

EPILOG = """\
What comes through a pipe is asked too, behind the words:  wsserver ask "What is this?" < README.md

exit status:
  0    the answer came to its end, or to --max-tokens
  1    the server refused or failed
  2    the command line is wrong
  3    the server cannot be reached, or the connection was lost and did not come back
  4    the server cut the answer off: it took too long, or the server stops
  130  it was stopped by Ctrl-C; 143: by SIGTERM; 141: nobody read on
"""


def main(arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """Run the command line; give the exit status."""
    parser = shell.parser("ask", "Asks a server, and prints the answer as it comes.", EPILOG, environment)
    parser.add_argument("words", nargs="*", metavar="QUESTION", help="what to ask")
    parser.add_argument("--raw", action="store_true", help="send the text as it is, for the model to go on with it")
    asked = parser.parse_args(arguments)
    try:
        question = _question(asked.words)
        if not question.strip():
            parser.error("ask something, or pipe it in")
        return asyncio.run(_ask(asked, question))
    except KeyboardInterrupt:
        return shell.INTERRUPTED
    except asyncio.CancelledError:
        return shell.TERMINATED
    except BrokenPipeError:
        # Nothing more can be written, and Python would try to once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return shell.CLOSED_PIPE
    except (ServerError, OSError) as error:
        status, why = shell.failure(error)
        return _say(why, status)


def _question(words: Sequence[str]) -> str:
    piped = ""
    if sys.stdin and not sys.stdin.isatty():
        piped = sys.stdin.buffer.read().decode(errors="replace")
    return "\n\n".join(filter(None, [" ".join(map(shell.readable, words)), piped]))


async def _ask(asked: argparse.Namespace, question: str) -> int:
    # Ctrl-C cancels this task by itself. Either way the server hears of it before the process ends.
    if task := asyncio.current_task():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    output = shell.Output()
    async with connect(asked.url, asked.key, on_state=output.state) as server:
        # Not only for the model's sake: this tells how its load goes.
        await server.init(asked.model, on_progress=output.progress)
        said = shell.parameters(asked)
        if asked.raw:
            answer = server.generate(prompt=question, on_progress=output.progress, **said)
        else:
            messages = [*shell.system(asked), {"role": "user", "content": question}]
            answer = server.generate(messages=messages, on_progress=output.progress, **said)
        try:
            async for token in answer:
                output.write(token)
        finally:
            output.end_line()
    reason = answer.done.finish_reason
    if reason in ("stop", "length"):
        return shell.OK
    return _say(f"the answer was cut off: {reason}", shell.CUT_OFF)


def _say(why: str, status: int) -> int:
    sys.stderr.write(f"wsserver ask: {why}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
