"""What a client assumes where it is not told otherwise."""

DEFAULT_URL = "nats://127.0.0.1:4222"
IDLE_TIMEOUT_S = 75.0
"""Silence after which a request is given up: longer than an ingress waits for a plan that can run it, so that it is the
cluster's error that is heard, and shorter than patience."""
CONNECT_TIMEOUT_S = 5.0
