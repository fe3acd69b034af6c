"""The same message handlers over MQTT: requests and answers are messages on a broker. Knows nothing about models."""
