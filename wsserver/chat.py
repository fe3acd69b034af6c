"""`wsserver chat`: a conversation in a terminal. Ctrl-C stops the answer that runs, and leaves where none does."""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from prompt_toolkit import PromptSession

from wsserver import shell
from wsserver.client import Client, Done, ServerError, State, connect

EPILOG = """\
In the chat: Enter asks; Ctrl-C stops the answer, and leaves when there is none, as Ctrl-D does.
/new begins another conversation, /model lists the models, /model VENDOR/MODEL goes on with another.
"""
HINT = "Ctrl-C stops an answer, and leaves when there is none. /new, /model and /help are the commands.\n"


def main(arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """Run the command line; give the exit status."""
    parser = shell.parser("chat", "Talks with a model of a server.", EPILOG, environment)
    asked = parser.parse_args(arguments)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        parser.error("a chat needs a terminal; `wsserver ask` does without")
    try:
        asyncio.run(_chat(asked))
    except (KeyboardInterrupt, EOFError, asyncio.CancelledError):
        return shell.OK
    except (ServerError, OSError) as error:
        status, why = shell.failure(error)
        sys.stderr.write(f"wsserver chat: {why}\n")
        return status
    return shell.OK


async def _chat(asked: argparse.Namespace) -> None:
    screen = Screen()
    async with connect(asked.url, asked.key, on_state=screen.state) as server:
        talk = Talk(server, screen, asked)
        await talk.choose(asked.model)
        screen.output.write(HINT)
        while True:
            await talk.take(await screen.read())


class Screen:
    """The terminal: a prompt, with a line under it that says with whom one talks, and what is written above it."""

    def __init__(self) -> None:
        self.model = ""
        self.output = shell.Output()
        self._state: State = "connected"
        self._prompt: PromptSession[str] = PromptSession(bottom_toolbar=self._toolbar)

    async def read(self) -> str:
        """Wait for what is typed next.

        Raises:
            KeyboardInterrupt, EOFError: the user wants to leave.
        """
        return await self._prompt.prompt_async("> ")

    def state(self, state: State) -> None:
        """Show how the connection stands."""
        self._state = state
        if self._prompt.app.is_running:
            self._prompt.app.invalidate()
        else:
            self.output.state(state)

    def _toolbar(self) -> str:
        return self.model if self._state == "connected" else f"{self.model}: {self._state}"


class Talk:
    """A conversation, and what can be typed into it."""

    def __init__(self, server: Client, screen: Screen, asked: argparse.Namespace) -> None:
        self._server = server
        self._screen = screen
        self._output = screen.output
        self._parameters = shell.parameters(asked)
        self._beginning = shell.system(asked)
        self._messages = list(self._beginning)

    async def choose(self, model: str | None) -> None:
        """Go on with another model, once it is loaded.

        Raises:
            ServerError: it cannot be loaded.
        """
        with self._interruptible():
            ready = await self._server.init(model, on_progress=self._output.progress)
        self._screen.model = ready.model.id
        self._output.clear()

    async def take(self, text: str) -> None:
        """Do what was typed. What the server refuses is told, and the conversation stays as it was."""
        try:
            match text.split():
                case []:
                    pass
                case ["/help"]:
                    self._output.write(EPILOG)
                case ["/new"]:
                    self._messages = list(self._beginning)
                case ["/model"]:
                    status = await self._server.status()
                    self._output.write("".join(f"{model}\n" for model in status.available))
                case ["/model", model]:
                    await self.choose(model)
                case _:
                    await self._ask({"role": "user", "content": text})
        except ServerError as error:
            self._output.end_line()
            self._output.write(f"[{shell.failure(error)[1]}]\n")

    async def _ask(self, question: dict[str, str]) -> None:
        conversation = [*self._messages, question]
        answer = self._server.generate(messages=conversation, on_progress=self._output.progress, **self._parameters)
        text = ""
        with self._interruptible():
            async for token in answer:
                text += token
                self._output.write(token)
        self._output.end_line()
        self._output.write(f"[{_in_words(answer.done)}]\n")
        self._messages = [*conversation, {"role": "assistant", "content": text}]

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let Ctrl-C stop what the server does, and a second one leave."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task
        presses = iter([self._server.cancel])

        def press() -> None:
            next(presses, task.cancel)()

        loop.add_signal_handler(signal.SIGINT, press)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)


def _in_words(done: Done) -> str:
    how = {"stop": "", "length": "the most tokens that were allowed, ", "cancelled": "stopped, "}
    speed = f", {done.timings.tokens_per_s:.1f} tokens/s" if done.timings.tokens_per_s else ""
    return f"{how.get(done.finish_reason, done.finish_reason + ', ')}{done.usage.completion_tokens} tokens{speed}"


if __name__ == "__main__":
    sys.exit(main())
