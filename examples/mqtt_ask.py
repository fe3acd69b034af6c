"""Asks over MQTT, prints the answer as it comes, and prints what was lost on the way from the whole answer in its end.

`.venv/bin/python examples/mqtt_ask.py [broker's host] [port] [root]`, beside a server that was started with --mqtt-url.
"""

import asyncio
import json
import sys
import uuid

from aiomqtt import Client, MqttError


async def main(host: str = "127.0.0.1", port: str = "1883", root: str = "llm/home") -> None:
    id = str(uuid.uuid4())
    reply = f"{root}/reply/{id}"
    ask = {"type": "generate", "id": id, "prompt": "Once upon a time", "max_tokens": 100, "reply_to": reply}
    printed, expected = "", 0
    while True:  # and again when the broker is lost: who asks the same again is answered, and nothing runs twice
        try:
            async with Client(host, int(port)) as broker:
                await broker.subscribe(reply, qos=1)
                await broker.publish(f"{root}/request", json.dumps(ask), qos=1)
                async for message in broker.messages:
                    frame = json.loads(message.payload)
                    if frame["type"] == "token" and frame["seq"] == expected:
                        print(frame["text"], end="", flush=True)
                        printed, expected = printed + frame["text"], expected + frame["n"]
                    elif frame["type"] == "done":
                        print(frame.get("text", "")[len(printed) :])
                        print(f"[{frame['finish_reason']} after {frame['usage']['completion_tokens']} tokens]")
                        return
                    elif frame["type"] == "error":
                        sys.exit(frame["message"])
        except MqttError as error:
            print(f"\n[{error}; trying again]", file=sys.stderr)
            await asyncio.sleep(1)  # or a broker that is down would be asked without a pause


asyncio.run(main(*sys.argv[1:]))
