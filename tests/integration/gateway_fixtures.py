"""A cluster with a gateway, and the clients that applications use."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai

from models.store import Store
from tests.integration.cluster_fixtures import (
    CHAT,
    CNN,
    EMBED,
    N0,
    N1,
    N2,
    SETTINGS,
    Oracle,
    Serving,
    serving,
    three_stages,
)

ANSWER_S = 30.0


@dataclass
class Front:
    """A cluster behind a gateway."""

    serving: Serving
    http: httpx2.AsyncClient
    """Speaks to the gateway as it is told to."""
    openai: openai.AsyncOpenAI

    @property
    def url(self) -> str:
        return self.serving.cluster.http_url

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status, and the JSON that is answered."""
        found = await self.http.post(path, json=body)
        return found.status_code, found.json()

    async def refused(self, path: str, body: Any) -> tuple[int, str, str | None]:
        """Status, code and field of the error that a request of OpenAI's API ends in."""
        status, plain = await self.post(path, body)
        error = plain["error"]
        assert error["message"]
        return status, error["resplit_code"], error["param"]

    async def events(self, path: str, body: Any) -> list[Any]:
        """The events of a stream; `[DONE]` as it is."""
        found: list[Any] = []
        async with self.http.stream("POST", path, json=body) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    data = line.removeprefix("data: ")
                    found.append(data if data == "[DONE]" else json.loads(data))
        return found


def openai_client(url: str, key: str = "none") -> openai.AsyncOpenAI:
    """The real one, which does not try again what failed."""
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=ANSWER_S)


@asynccontextmanager
async def front(folder: Path, store: Store, oracle: Oracle, agents: int = 3) -> AsyncIterator[Front]:
    """A fresh cluster with a gateway, nothing deployed."""
    async with serving(folder, store, oracle, agents, http_port=0) as running:
        url = running.cluster.http_url
        async with httpx2.AsyncClient(base_url=url, timeout=ANSWER_S) as http, openai_client(url) as client:
            yield Front(running, http, client)


@asynccontextmanager
async def busy_front(folder: Path, store: Store, oracle: Oracle) -> AsyncIterator[Front]:
    """The decoder over three stages, the embedder and the CNN over two each, behind a gateway."""
    async with front(folder, store, oracle) as found:
        await found.serving.deploy(CHAT, "llama", placement=three_stages(N0, N1, N2), settings=SETTINGS)
        await found.serving.deploy(EMBED, "embedder", stages=2)
        await found.serving.deploy(CNN, "cnn", stages=2)
        yield found
