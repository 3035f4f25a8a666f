"""Making room in the audit stream without losing an event, or the right to say that none was lost.

The stream allows neither delete nor purge, so it is not emptied: it is *sealed*, which for good keeps anybody from
adding to it, exported to its very end, removed, and made anew with the sequence that follows. Writers keep what they
record meanwhile and go on in their chains, so the export and the new stream verify together as one trail
(`resplit audit verify --file EXPORT --and-stream`). Whoever stops half way finds the stream sealed and its writers
waiting; the same again goes on from there.
"""

from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import StreamConfig

from bus.replicas import with_replicas
from schemas import subjects
from schemas.errors import ErrorCode, ResplitError


async def seal_trail(js: JetStreamContext) -> StreamConfig:
    """Nothing can be added to the stream any more; how it was configured before. Raises UNREACHABLE."""
    try:
        config = (await js.stream_info(subjects.STREAM_AUDIT)).config
        if not config.sealed:
            await js.update_stream(config, sealed=True)
    except (NatsError, TimeoutError) as error:
        raise ResplitError(ErrorCode.UNREACHABLE, f"the audit stream could not be sealed: {error!r}") from error
    return config


async def begin_anew(js: JetStreamContext, config: StreamConfig, exported: int) -> None:
    """Replace the sealed stream by an empty one that goes on behind it, if `exported` is all that it holds."""
    try:
        state = (await js.stream_info(subjects.STREAM_AUDIT)).state
        if state.messages != exported:
            message = f"{exported} events were exported and {state.messages} are there; the stream stays, sealed"
            raise ResplitError(ErrorCode.INTERNAL, message)
        await js.delete_stream(subjects.STREAM_AUDIT)
        fresh = config.evolve(sealed=False, first_seq=state.last_seq + 1)
        await with_replicas(js, lambda count: js.add_stream(fresh, num_replicas=count))
    except (NatsError, TimeoutError) as error:
        message = f"the export is complete, but no new audit stream could be made ({error!r}); start an orchestrator"
        raise ResplitError(ErrorCode.UNREACHABLE, message) from error
