"""One way for agents and orchestrators to connect to NATS: until a server is there, and whatever becomes of it."""

import asyncio
import logging
import re
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from bus.credentials import API_OF, Credentials, NatsOptions
from natstls.client import DeniedError, Notify, SafeClient, UnsentError
from natstls.faults import explained
from natstls.patience import Backoff
from schemas import subjects
from schemas.base import Home
from schemas.errors import ErrorCode, ResplitError

DEFAULT_URL = "nats://127.0.0.1:4222"
EAGER = Backoff(0.1, 0.25)
"""Before clients (`natstls.client.PATIENT`), so that what they ask then finds somebody."""
SETTLE_S = 10.0

NO_LOGIN = re.compile("authorization violation", re.IGNORECASE)
NO_LOGIN_S = 2.0
"""Who is not let in knocks no more often than this: the server writes each time into its log."""

log = logging.getLogger(__name__)


class ForbiddenError(DeniedError, ResplitError):
    """The server does not let this member do what it tried."""

    def __init__(self, verb: str, subject: str) -> None:
        message = (
            f"the NATS server denies this member to {verb} {subject!r}; its login is of another role or of an earlier "
            f"release: carry the newest logins.conf to the server and reload it"
        )
        ResplitError.__init__(self, ErrorCode.FORBIDDEN, message, "subject")
        self.verb, self.subject = verb, subject

    def __reduce__(self) -> Any:
        return ResplitError, (self.code, self.message, self.field)


class FullError(UnsentError, ResplitError):
    """So much waits for a server already that no more is taken."""

    def __init__(self, waiting: int) -> None:
        message = f"{waiting} bytes wait to be sent to a NATS server that does not take them; see to it, then ask again"
        ResplitError.__init__(self, ErrorCode.UNREACHABLE, message)
        self.waiting = waiting

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> Any:
        return ResplitError, (self.code, self.message, self.field)


class MemberClient(SafeClient):
    """A connection with a login, which asks JetStream where its account may; without, for tests, one of nobody."""

    def __init__(self, credentials: Credentials | None = None) -> None:
        super().__init__()
        self._api_prefix = None if credentials is None else credentials.api_prefix

    def jetstream(self, **options: Any) -> JetStreamContext:
        prefix = {} if self._api_prefix is None else {"prefix": self._api_prefix}
        return super().jetstream(**{**prefix, **options})

    def denial(self, verb: str, subject: str) -> DeniedError:
        return ForbiddenError(verb, subject)

    def overflow(self, waiting: int) -> UnsentError:
        return FullError(waiting)


async def connect(
    url: str,
    name: str,
    *,
    credentials: Credentials | None = None,
    on_lost: Notify | None = None,
    on_back: Notify | None = None,
) -> MemberClient:
    """Connect as `name`, trying until a server answers: says once that it is waiting, and once that it is in.

    `url` may be several, with commas between: any of them will do. The connection then outlives any number of server
    restarts. With `credentials` it speaks TLS, logs in with their NKey and has their inboxes; what the server then
    refuses, the login or what is done with it, is logged once each, and so is why it is not believed. Who is not let
    in, not yet or not any more, tries until it is.
    """
    is_up = waiting = False
    client = MemberClient(credentials)

    async def lost() -> None:
        log.warning("the NATS server is gone; trying until it is back")
        if on_lost is not None:
            await on_lost()

    async def back() -> None:
        log.warning("the NATS server is back")
        if on_back is not None:
            await on_back()

    async def failed(error: Exception) -> None:
        nonlocal waiting
        log.debug("NATS: %r", error)
        no_tls, no_login = explained(error), NO_LOGIN.search(str(error))
        if no_tls is not None:
            client.say_once(f"the NATS server at {url} {no_tls}")
        elif no_login is not None:
            client.say_once(f"the NATS server refuses: {error}")
        elif not is_up and not waiting:
            waiting = True
            log.warning("no NATS server at %s yet; trying until there is one", url)
        if no_tls is not None or no_login is not None:
            await asyncio.sleep(NO_LOGIN_S)  # nats-py waits for it

    login: NatsOptions | dict[str, Any] = {} if credentials is None else credentials.nats_options
    await client.connect(
        url.split(","), name=name, backoff=EAGER, disconnected_cb=lost, reconnected_cb=back, error_cb=failed, **login
    )
    is_up = True
    if waiting:
        log.warning("connected to %s", url)
    return client


async def settle(client: Client, timeout_s: float = SETTLE_S) -> None:
    """Return once the server has acted on all that was subscribed and published here before. Raises TimeoutError, and
    the `DeniedError` of a subscription that the server denies.

    `Client.flush` does not promise that: nats-py sends its PING ahead of what still waits to be written, so for a
    moment the server may tell others that nobody listens. What is said to oneself waits its turn.
    """
    arrived = asyncio.Event()

    async def note(_: Msg) -> None:
        arrived.set()

    inbox = client.new_inbox()
    subscription = await client.subscribe(inbox, cb=note)
    await client.publish(inbox)
    async with asyncio.timeout(timeout_s):
        await arrived.wait()
    await subscription.unsubscribe()
    if isinstance(client, SafeClient) and client.unheard:
        raise next(iter(client.unheard.values()))


def jetstream_at(client: Client, home: Home, **options: Any) -> JetStreamContext:
    """What `home` keeps, as those at the EDGE ask for it; who steers or watches there asks `client.jetstream`."""
    if home is not None:
        options = {"prefix": subjects.at_edge(home, API_OF["EDGE"]), **options}
    return client.jetstream(**options)
