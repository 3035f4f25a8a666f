"""Resplit: one large model across several small machines, re-cut while tokens flow.

An application needs only the client:

    from resplit import Client

    async with Client("nats://127.0.0.1:4222", keys="keys-app") as client:
        async for token in client.stream("adder", "348+1275="):
            print(token.text, end="")

Importing this package imports nothing else; its names are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resplit.client import Client
    from resplit.replies import (
        Completion,
        Embeddings,
        RequestError,
        StageTiming,
        Tensor,
        TensorResult,
        Token,
        TokenLogprob,
        Usage,
    )

__all__ = [
    "Client",
    "Completion",
    "Embeddings",
    "RequestError",
    "StageTiming",
    "Tensor",
    "TensorResult",
    "Token",
    "TokenLogprob",
    "Usage",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("resplit.client" if name == "Client" else "resplit.replies"), name)
