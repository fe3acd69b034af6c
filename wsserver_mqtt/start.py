"""What a server is given that has a broker: the settings are looked at, and the face is made."""

from wsserver.auth import Keys
from wsserver.config import Config
from wsserver.peer import Dispatch
from wsserver.server import Server
from wsserver_mqtt.address import address, default_root, see_to_keys
from wsserver_mqtt.bulletin import Overview
from wsserver_mqtt.face import Face
from wsserver_mqtt.topics import topics


def make_face(
    config: Config, password: str | None, server: Server, keys: Keys, dispatch: Dispatch, overview: Overview
) -> Face:
    """Make the face that the settings ask for.

    Raises:
        BadSetting: they cannot be.
    """
    broker = address(config.mqtt_url, password, config.mqtt_ca, config.mqtt_cert, config.mqtt_key)
    see_to_keys(config, keys, broker.host)
    ours = topics(config.mqtt_root or default_root(), config.mqtt_reply_topics)
    return Face(broker, ours, server, keys, dispatch, overview)
