"""One connection to a broker: the only file that knows the MQTT library. Knows no messages of ours.

The library sends without waiting, and keeps what the socket does not take; it swallows what the broker says to a message of
QoS 1. Here both can be waited for, and what was not acknowledged when the connection is lost can be sent again.
"""

import asyncio
import logging
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiomqtt
from paho.mqtt.client import Client as Paho
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from wsserver_mqtt.address import Address
from wsserver_mqtt.messages import Arrived, Outgoing
from wsserver_mqtt.share import Share

log = logging.getLogger(__name__)

# Seconds between two signs of life; the broker tells the will after one and a half times that, if this process hangs.
KEEPALIVE = 10
# Messages of QoS 1 that may be on their way; the library lets no more than 20 of them out at once.
MAX_UNACKNOWLEDGED = 100
# Messages that wait to be read here; reading one never waits for anything.
MAX_UNREAD = 1000
# What the broker is to deliver beside the payload: the topics, and the properties.
ROOM_FOR_PROPERTIES = 65_536

# Bytes that may lie in the socket: while it is not read, a sign of life from the broker waits behind them.
UNREAD_BYTES = 65_536

NO_SUBSCRIBERS = 0x10  # MQTT 5's "no matching subscribers"

BrokerLost = aiomqtt.MqttError


class Broker(aiomqtt.Client):
    """A connection, an async context manager; losing it raises `BrokerLost` wherever it is waited for."""

    def __init__(self, address: Address, identifier: str, max_bytes: int, will: Outgoing | None = None) -> None:
        connecting = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        connecting.MaximumPacketSize = max_bytes + ROOM_FOR_PROPERTIES
        super().__init__(
            address.host,
            address.port,
            username=address.user,
            password=address.password,
            identifier=identifier,
            protocol=aiomqtt.ProtocolVersion.V5,
            will=aiomqtt.Will(will.topic, will.payload, will.qos, will.retain) if will else None,
            keepalive=KEEPALIVE,
            max_queued_incoming_messages=MAX_UNREAD,
            properties=connecting,
            tls_context=address.tls,
            # Without it every second small message waits for an acknowledgement of the one before, 40 ms or more.
            socket_options=[
                (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
                (socket.SOL_SOCKET, socket.SO_RCVBUF, UNREAD_BYTES),
            ],
        )
        self._share = Share()
        self._again: asyncio.Handle | None = None  # when more is read that no reader is told of
        # What was published with QoS 1 and not acknowledged yet, by the library's numbers.
        self._on_their_way: dict[int, Outgoing] = {}
        self._moved = asyncio.Event()
        # Told of a message of QoS 1 that the broker does not take, and of one that nobody listens to.
        self.on_refused: Callable[[Outgoing, str], None] = lambda message, why: None
        self.on_unheard: Callable[[Outgoing], None] = lambda message: None

    @property
    def unacknowledged(self) -> list[Outgoing]:
        """What may have to be published again on another connection, oldest first."""
        return list(self._on_their_way.values())

    async def listen(self, *filters: str) -> None:
        """Subscribe, with QoS 1 and without what is retained: that was for somebody else.

        Raises:
            BrokerLost: the broker does not allow it, or is gone.
        """
        options = SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND)
        codes = await self.subscribe([(filter, options) for filter in filters])
        for filter, code in zip(filters, codes, strict=True):
            if isinstance(code, ReasonCode) and code.is_failure:
                raise BrokerLost(f"the broker lets nobody of this name subscribe to {filter}: {code}")

    async def arrivals(self) -> AsyncIterator[Arrived]:
        """Give what is delivered, as long as the connection lasts."""
        async for message in self.messages:
            payload = message.payload if isinstance(message.payload, bytes) else b""
            yield _arrived(str(message.topic), payload, message.properties)

    def post(self, message: Outgoing) -> None:
        """Publish a message, without waiting for anything.

        Raises:
            BrokerLost: the connection is gone; what has QoS 1 is among the unacknowledged.
        """
        info = self._client.publish(message.topic, message.payload, message.qos, message.retain, _properties(message))
        if message.qos:
            self._on_their_way[info.mid] = message
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            raise aiomqtt.MqttCodeError(info.rc, "cannot publish")

    async def written(self) -> None:
        """Wait until the socket has taken everything, and the broker acknowledges what it gets."""
        await self._until(lambda: not self._client.want_write() and len(self._on_their_way) < MAX_UNACKNOWLEDGED)

    async def acknowledged(self) -> None:
        """Wait until the broker has acknowledged everything."""
        await self._until(lambda: not self._client.want_write() and not self._on_their_way)

    def worked(self, seconds: float) -> None:
        """Count the time that it took to answer what was read: reading rests for it."""
        self._share.rest_after(seconds, time.monotonic())

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._moved.clear()
            await self._moved.wait()

    def _on_publish(
        self, client: Paho, userdata: Any, mid: int, reason_code: ReasonCode, properties: Properties | None
    ) -> None:
        """Hear that a message was written, or of QoS 1 what the broker says to it."""
        message = self._on_their_way.pop(mid, None)
        self._moved.set()
        if message and reason_code.is_failure:
            self.on_refused(message, str(reason_code))
        elif message and reason_code.value == NO_SUBSCRIBERS:
            self.on_unheard(message)

    def _on_socket_open(self, client: Paho, userdata: Any, sock: Any) -> None:
        """Read a packet a turn, and none for a while once messages have taken their share of the time.

        What comes meanwhile waits at the broker, which drops what is too much.
        """
        super()._on_socket_open(client, userdata, sock)
        number = sock.fileno()
        # Called from the thread that connects; the library has just asked for a reader of its own, whose place this takes.
        self._loop.call_soon_threadsafe(self._loop.add_reader, number, self._read_packet, client, number)

    def _read_packet(self, client: Paho, number: int) -> None:
        began = time.thread_time()  # not the wall's: a model that runs keeps the interpreter meanwhile
        try:
            client.loop_read()
        except Exception as error:  # as the library does: it ends the connection
            if not self._disconnected.done():
                self._disconnected.set_exception(error)
            return
        rest = self._share.rest_after(time.thread_time() - began, time.monotonic())
        if self._again:  # one that is on its way would end this rest
            self._again.cancel()
        if rest and self._open_at(client, number):
            self._loop.remove_reader(number)
            self._again = self._loop.call_later(rest, self._read_again, client, number)
        elif _decrypted(client):
            self._again = self._loop.call_soon(self._read_again, client, number)

    def _read_again(self, client: Paho, number: int) -> None:
        if self._open_at(client, number):
            self._loop.add_reader(number, self._read_packet, client, number)
            if _decrypted(client):
                self._read_packet(client, number)

    def _open_at(self, client: Paho, number: int) -> bool:
        """Whether the socket is the same still: another one may have got its number."""
        sock = client.socket()
        return sock is not None and sock.fileno() == number

    def _on_socket_unregister_write(self, client: Paho, userdata: Any, sock: Any) -> None:
        super()._on_socket_unregister_write(client, userdata, sock)
        self._moved.set()


def _decrypted(client: Paho) -> bool:
    """Whether TLS holds bytes that no reader would be told of: they have left the socket."""
    sock = client.socket()
    return isinstance(sock, ssl.SSLSocket) and sock.pending() > 0


def _arrived(topic: str, payload: bytes, properties: Properties | None) -> Arrived:
    def told(name: str) -> Any:
        return getattr(properties, name, None)

    user_properties = dict(told("UserProperty") or ())
    return Arrived(
        topic, payload, told("ResponseTopic"), told("CorrelationData"), told("MessageExpiryInterval"), user_properties
    )


def _properties(message: Outgoing) -> Properties | None:
    if message.correlation is None and message.response_topic is None and message.token is None:
        return None
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if message.correlation is not None:
        properties.CorrelationData = message.correlation
    if message.response_topic is not None:
        properties.ResponseTopic = message.response_topic
    if message.token is not None:
        properties.UserProperty = ("token", message.token)
    return properties
