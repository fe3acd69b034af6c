"""The server on a broker: connects, again and again, listens for requests, and publishes what there is to say.

Knows no models. Whatever the broker does, the WebSocket side goes on.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from wsserver.auth import Keys
from wsserver.peer import Dispatch
from wsserver.protocol import Refusal
from wsserver.server import Server
from wsserver_mqtt.address import Address
from wsserver_mqtt.back_off import delays
from wsserver_mqtt.broker import Broker, BrokerLost
from wsserver_mqtt.bulletin import LOOK, Bulletin, Overview
from wsserver_mqtt.incoming import Unanswerable, read
from wsserver_mqtt.intake import Excess, Intake, Publisher
from wsserver_mqtt.messages import Arrived, Outgoing
from wsserver_mqtt.replies import Replies
from wsserver_mqtt.reply import Reply
from wsserver_mqtt.topics import Topics

log = logging.getLogger(__name__)

# Messages that are given to the library before others have a turn, and before it is looked at whether the socket takes them:
# one costs a tenth of a millisecond.
BATCH = 8
TOO_FAST = "too many messages came over the broker in too short a time; send fewer"
# Seconds for what is left to say when the server ends.
CLOSE_TIMEOUT = 2.0


class Face:
    """A server's other face, an async context manager; leaving it says goodbye to the broker."""

    def __init__(
        self,
        address: Address,
        topics: Topics,
        server: Server,
        keys: Keys,
        dispatch: Dispatch,
        overview: Overview,
        waits: Callable[[], Iterator[float]] = delays,
    ) -> None:
        self.listening = asyncio.Event()  # to the broker, just now
        self._address = address
        self._topics = topics
        self._config = server.state.config
        self._identifier = f"wsserver-{secrets.token_hex(8)}"
        self._replies = Replies(server, keys, dispatch, self._has_news)
        self._intake = Intake(self._config.messages_per_second, self._config.mqtt_messages_per_second)
        self._bulletin = Bulletin(topics, overview)
        self._happened = asyncio.Event()
        self._waits = waits
        # What has something to say, in the order in which it is its turn; and what was not acknowledged before.
        self._talking: dict[Reply, None] = {}
        self._again: list[Outgoing] = []
        self._news = asyncio.Event()
        self._closing = asyncio.Event()
        self._unheard: asyncio.TimerHandle | None = None
        self._run: asyncio.Task[None]

    async def __aenter__(self) -> Self:
        self._run = asyncio.create_task(self._stay_connected())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing.set()
        if self.listening.is_set():
            await asyncio.wait([self._run], timeout=2 * CLOSE_TIMEOUT)
        self._run.cancel()
        await asyncio.gather(self._run, return_exceptions=True)
        self._heard_again()
        await self._replies.leave()

    def tell(self, event: str, model: str) -> None:
        """Tell everybody what happened to a model."""
        self._bulletin.event(event, model)
        self._happened.set()

    async def _stay_connected(self) -> None:
        waits = self._waits()
        while not self._closing.is_set():
            try:
                async with self._broker() as broker:
                    await broker.listen(f"{self._topics.request}/#", f"{self._topics.cancel}/#")
                    waits = self._waits()
                    log.info("mqtt: listening on %s at %s:%d", self._topics.request, self._address.host, self._address.port)
                    await self._serve(broker)
            except BrokerLost as error:
                log.warning("mqtt: %s: %s", self._address.host, error)
            except Exception:
                # Whatever was wrong here, the WebSocket side goes on, and the broker is tried again like a lost one.
                log.exception("mqtt: serving at %s failed", self._address.host)
            if not self._closing.is_set():
                wait = next(waits)
                log.info("mqtt: trying again in %.1f s", wait)
                await self._until_closing(wait)

    def _broker(self) -> Broker:
        return Broker(self._address, self._identifier, self._config.max_message_bytes, self._bulletin.offline)

    async def _serve(self, broker: Broker) -> None:
        """Serve over one connection, until it is lost or the server ends."""
        broker.on_refused = _refused
        broker.on_unheard = _unheard
        works = (self._read(broker), self._write(broker), self._inform(broker), self._closing.wait())
        tasks = [asyncio.create_task(work) for work in works]
        self._found()
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            # A state is told anew; everything else would not be.
            self._again[:0] = [message for message in broker.unacknowledged if not message.retain]
            self._lost()
        for end in ends:
            if isinstance(end, Exception):
                raise end
        broker.post(self._bulletin.offline)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await broker.acknowledged()

    async def _read(self, broker: Broker) -> None:
        async for arrived in broker.arrivals():
            began = time.thread_time()
            self._hear(arrived)
            broker.worked(time.thread_time() - began)
            # Many that came at once are there without a wait; others have their turn all the same.
            await asyncio.sleep(0)

    def _hear(self, arrived: Arrived) -> None:
        config = self._config
        excess = self._intake.take(self._publisher(arrived), len(arrived.payload), time.monotonic())
        if excess and not excess.answered:
            return  # counted, and logged once a second
        try:
            message = read(arrived, self._topics, config.max_message_bytes, config.max_json_depth)
            if excess:
                self._replies.refuse(message, _too_fast(excess))
            else:
                self._replies.hear(message)
        except Unanswerable as why:
            log.info("mqtt: a message at %.200a is not answered: %s", arrived.topic, why)

    def _publisher(self, arrived: Arrived) -> Publisher:
        cancels = self._topics.takes_only_cancels(arrived.topic)
        return Publisher(self._topics.user(arrived.topic) or "", arrived.response_topic or "", cancels)

    async def _write(self, broker: Broker) -> None:
        while self._again:
            broker.post(self._again.pop(0))
        while True:
            while self._talking:
                for _ in range(BATCH):
                    self._say_one(broker)
                await broker.written()
            self._news.clear()
            await self._news.wait()

    async def _inform(self, broker: Broker) -> None:
        self._bulletin.start_anew()
        while True:
            for message in self._bulletin.due(time.monotonic()):
                broker.post(message)
            if dropped := self._intake.dropped():
                log.warning("mqtt: %d messages came too fast and were dropped", dropped)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK):
                    await self._happened.wait()
            self._happened.clear()

    def _say_one(self, broker: Broker) -> None:
        """Let whose turn it is say one thing."""
        reply = next(iter(self._talking), None)
        if reply is None:
            return
        del self._talking[reply]
        if message := reply.take():
            self._talking[reply] = None
            broker.post(message)

    def _has_news(self, reply: Reply) -> None:
        self._talking[reply] = None
        self._news.set()

    def _found(self) -> None:
        self.listening.set()
        self._heard_again()

    def _lost(self) -> None:
        """Let what runs go on, but not for long."""
        self.listening.clear()
        self._unheard = asyncio.get_running_loop().call_later(self._config.stall_timeout, self._replies.give_up)

    def _heard_again(self) -> None:
        if self._unheard:
            self._unheard.cancel()

    async def _until_closing(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closing.wait()


def _too_fast(excess: Excess) -> Refusal:
    why = TOO_FAST + (f"; {excess.dropped} before this one were dropped" if excess.dropped else "")
    return Refusal("rate_limited", why, retry_after=excess.retry_after)


def _refused(message: Outgoing, why: str) -> None:
    log.warning("mqtt: the broker did not take a message at %.200a: %s", message.topic, why)


def _unheard(message: Outgoing) -> None:
    log.debug("mqtt: nobody listens at %.200a", message.topic)
