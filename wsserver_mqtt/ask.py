"""`wsserver mqtt ask`: one question to a server on a broker, and its answer on stdout as it comes."""

import argparse
import asyncio
import os
import secrets
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from wsserver.config import BadSetting
from wsserver_mqtt.address import Address, address, default_root
from wsserver_mqtt.broker import Broker, BrokerLost
from wsserver_mqtt.messages import Outgoing
from wsserver_mqtt.topics import Topics, topics

# How it ends: what a shell sees of it; after a signal as if that had ended it.
OK, REFUSED, USAGE, NO_BROKER, CUT_OFF, INTERRUPTED = 0, 1, 2, 3, 4, 128 + signal.SIGINT
EPILOG = """\
The broker's password is read from WSSERVER_MQTT_PASSWORD and the server's key from WSSERVER_API_KEY, because everybody on a
machine can read its command lines. Who has a name at the broker asks and hears below that name.

exit status:
  0    the answer came to its end, or to --max-tokens
  1    the server or the broker refused, or the server failed
  2    the command line is wrong
  3    there is no broker, or no server listens there
  4    the answer was cut off
  130  it was stopped by Ctrl-C
"""
MAX_ANSWER = 16 << 20  # bytes of a message


class Failed(Exception):
    """Why there is no answer, in words, and the exit status."""

    def __init__(self, why: str, status: int) -> None:
        super().__init__(why)
        self.status = status


def main(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> int:
    """Run the command line; give the exit status."""
    asked = _parser(environment).parse_args(arguments)
    try:
        broker = address(asked.mqtt_url, environment.get("WSSERVER_MQTT_PASSWORD"), asked.mqtt_ca)
        return asyncio.run(_ask(asked, broker, topics(asked.mqtt_root, ()), environment.get("WSSERVER_API_KEY")))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BadSetting as error:
        return _say(str(error), USAGE)
    except BrokerLost as error:
        return _say(f"the broker cannot be reached, or was lost: {error}", NO_BROKER)
    except Failed as error:
        return _say(str(error), error.status)


def _parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wsserver mqtt", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="ask")
    told = "ask one question, and print the answer as it comes"
    raw = argparse.RawDescriptionHelpFormatter
    ask = commands.add_parser("ask", help=told, description=told, epilog=EPILOG, formatter_class=raw, allow_abbrev=False)
    ask.add_argument("words", nargs="+", metavar="QUESTION", help="what to ask")
    for name, default, metavar, what in (
        ("mqtt-url", "mqtt://127.0.0.1", "URL", "the broker"),
        ("mqtt-root", default_root(), "TOPIC", "the topic that all of the server's begin with"),
        ("mqtt-ca", "", "FILE", "file of the certificates that the broker's is checked with"),
    ):
        variable = f"WSSERVER_{name.replace('-', '_').upper()}"
        shown = f"{what}; or {variable} in the environment (default: {default or 'the system'})"
        ask.add_argument(f"--{name}", default=environment.get(variable, default), metavar=metavar, help=shown)
    ask.add_argument("--model", metavar="VENDOR/MODEL", help="who answers (default: the server's default model)")
    ask.add_argument("--raw", action="store_true", help="send the text as it is, for the model to go on with it")
    ask.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of the answer")
    ask.add_argument("--temperature", type=float, metavar="X", help="0 is always the likeliest token")
    return parser


async def _ask(asked: argparse.Namespace, at: Address, where: Topics, key: str | None) -> int:
    below = f"/{at.user}" if at.user else ""
    reply = f"{where.root}/reply{below}/{secrets.token_hex(8)}"
    async with Broker(at, f"wsserver-ask-{secrets.token_hex(8)}", MAX_ANSWER) as broker:

        def say(topic: str, **message: Any) -> None:
            payload = orjson.dumps({name: value for name, value in message.items() if value is not None})
            broker.post(Outgoing(topic + below, payload, qos=1, response_topic=reply, token=key))

        await broker.listen(reply)
        answer, verdict = asyncio.create_task(_print(broker)), _verdict(broker)
        if asked.model:
            say(where.request, type="init", model=asked.model)
        say(where.request, type="generate", id="ask", **_question(asked))
        waited: list[asyncio.Future[Any]] = [answer, verdict]
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            answer.cancel()
            say(where.cancel, type="cancel")
            await broker.acknowledged()
            raise
        if answer.done():
            return answer.result()
        answer.cancel()
        raise verdict.result()


def _verdict(broker: Broker) -> asyncio.Future[Failed]:
    """Give what the broker will say to a question that it does not take, or that nobody listens to."""
    verdict: asyncio.Future[Failed] = asyncio.get_running_loop().create_future()

    def fail(why: str, status: int) -> None:
        if not verdict.done():
            verdict.set_result(Failed(why, status))

    broker.on_refused = lambda message, why: fail(f"the broker does not let you ask at {message.topic}: {why}", REFUSED)
    broker.on_unheard = lambda message: fail(f"no server listens at {message.topic}", NO_BROKER)
    return verdict


def _question(asked: argparse.Namespace) -> dict[str, Any]:
    # What the command line holds that is no text is left out.
    text = os.fsencode(" ".join(asked.words)).decode(errors="replace")
    said = {"prompt": text} if asked.raw else {"messages": [{"role": "user", "content": text}]}
    return {**said, "max_tokens": asked.max_tokens, "temperature": asked.temperature}


async def _print(broker: Broker) -> int:
    """Print the answer as it comes; what was lost on the way, from there on when its end comes."""
    text, seq = "", 0
    async for arrived in broker.arrivals():
        frame = orjson.loads(arrived.payload)
        if frame["type"] == "token" and frame["seq"] == seq:
            text, seq = text + frame["text"], seq + frame["n"]
            _write(frame["text"])
        elif frame["type"] == "done":
            whole = frame.get("text", text)
            _write(whole[len(text) :] + ("\n" if whole else ""))
            return _end(frame)
        elif frame["type"] == "error":
            raise Failed(frame["message"], REFUSED)
    raise BrokerLost("nothing more is delivered")


def _end(done: dict[str, Any]) -> int:
    if done["finish_reason"] == "error":
        raise Failed(done["error"]["message"], REFUSED)
    if done["finish_reason"] in ("stop", "length"):
        return OK
    raise Failed(f"the answer was cut off: {done['finish_reason']}", CUT_OFF)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(why: str, status: int) -> int:
    sys.stderr.write(f"wsserver mqtt ask: {why}\n")
    return status
