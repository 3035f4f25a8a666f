"""What a client assumes where it is not told otherwise."""

DEFAULT_URL = "nats://127.0.0.1:4222"
IDLE_TIMEOUT_S = 60.0
"""Silence after which a request is given up: longer than a full queue takes, shorter than patience."""
CONNECT_TIMEOUT_S = 5.0
