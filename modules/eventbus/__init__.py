"""eventbus: bridges the bus to an MQTT broker."""
