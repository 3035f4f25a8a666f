"""One request to a model without a cache: tensors in, tensors out, or texts in, vectors out."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from agent.replies import ReplyTo
from agent.tensors import pool, read_inputs, requested_outputs, text_inputs, write_outputs
from agent.urgency import UNHURRIED, Urgency
from agent.usage import Meter
from models.text import Text
from schemas.base import Digest, RequestId
from schemas.errors import ErrorCode, ResplitError
from schemas.frame import SequenceId
from schemas.journal import Handle
from schemas.manifest import Manifest, ModelKind
from schemas.request import EmbeddingItem, EmbeddingReply, EmbeddingRequest, TensorReply, TensorRequest
from schemas.slo import BEST_EFFORT, Slo
from schemas.tensor import Array

TEXTS_MAX = 256


@dataclass(eq=False)
class TensorJob:
    """A request as one or more calls; each text of an embedding request is a call of its own, unpadded,
    so that a text's vector never depends on its neighbours."""

    request_id: RequestId
    request: TensorRequest | EmbeddingRequest
    reply: ReplyTo
    model: Digest
    manifest: Manifest
    meter: Meter
    deadline: float | None
    waiting: deque[tuple[int, dict[str, Array]]]
    """Calls to make, each with its place among the answers."""
    prompt_tokens: int = 0
    outputs: tuple[str, ...] = ()
    _calls: dict[SequenceId, tuple[int, dict[str, Array]]] = field(default_factory=dict)
    """Those that were made and are not answered, as they waited: any may have to be made again."""
    _vectors: dict[int, tuple[float, ...]] = field(default_factory=dict)
    interrupted_at: float | None = None
    """Since when a call of it waits to be made again, as what ran it is gone."""
    recoveries: int = 0
    handle: Handle | None = None
    """Its number in the journal, once it is accepted."""
    slo: Slo = BEST_EFFORT
    urgency: Urgency = UNHURRIED

    @property
    def has_begun(self) -> bool:
        """Whether a call of it was made."""
        return self.meter.started is not None

    def started(self, sequence: SequenceId) -> None:
        """The first waiting call is on its way as `sequence`."""
        self._calls[sequence] = self.waiting.popleft()
        self.interrupted_at = None

    def restart(self, sequence: SequenceId) -> None:
        """A call came to nothing: it waits again, before the others, and keeps its place among the answers."""
        self.waiting.appendleft(self._calls.pop(sequence))

    def take(self, sequence: SequenceId, tensors: dict[str, Array], now: float) -> TensorReply | EmbeddingReply | None:
        """The answer to one call; the reply once every call is answered."""
        if isinstance(self.request, TensorRequest):
            return self._computed(self.request, tensors, now)
        vector = pool(tensors[self.manifest.outputs[0].name], self.manifest)
        place, _ = self._calls.pop(sequence)
        self._vectors[place] = tuple(vector.tolist())
        if self.waiting or self._calls:
            return None
        return self._embedded(self._vectors, now)

    def answered_outside(
        self, vectors: Sequence[tuple[float, ...]] | None, tensors: Mapping[str, Array] | None, now: float
    ) -> TensorReply | EmbeddingReply:
        """The reply, where a cloud computed all of it: `vectors` of texts, else `tensors`."""
        self.waiting.clear()
        if vectors is not None:
            return self._embedded(dict(enumerate(vectors)), now)
        assert tensors is not None
        assert isinstance(self.request, TensorRequest)
        return self._computed(self.request, tensors, now)

    def _computed(self, request: TensorRequest, tensors: Mapping[str, Array], now: float) -> TensorReply:
        return TensorReply(
            request_id=self.request_id,
            id=request.id or self.request_id,
            model_name=self.manifest.name,
            outputs=write_outputs(tensors, self.outputs, binary=request.inputs[0].raw is not None),
            usage=self.meter.usage(0, 0, now),
        )

    def _embedded(self, vectors: Mapping[int, tuple[float, ...]], now: float) -> EmbeddingReply:
        data = tuple(EmbeddingItem(index=i, embedding=v) for i, v in sorted(vectors.items()))
        usage = self.meter.usage(self.prompt_tokens, 0, now)
        return EmbeddingReply(request_id=self.request_id, data=data, usage=usage)


def open_job(
    request: TensorRequest | EmbeddingRequest,
    request_id: RequestId,
    reply: ReplyTo,
    model: Digest,
    manifest: Manifest,
    text: Text | None,
    deadline: float | None,
    meter: Meter,
) -> TensorJob:
    """Check the request against the manifest; raises `ResplitError` naming the field at fault."""
    job = TensorJob(request_id, request, reply, model, manifest, meter, deadline, deque())
    if manifest.kind is ModelKind.DECODER:
        message = f"{manifest.name} generates text and nothing else: send `prompt`, `messages` or `token_ids`"
        given = "inputs" if isinstance(request, TensorRequest) else "input"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, given)
    if isinstance(request, TensorRequest):
        job.waiting.append((0, read_inputs(request, manifest)))
        job.outputs = requested_outputs(request, manifest)
        return job
    if manifest.kind is not ModelKind.EMBEDDER or text is None:
        raise ResplitError(ErrorCode.INVALID_REQUEST, f"{manifest.name} takes tensors: send `inputs`", "input")
    sentences = (request.input,) if isinstance(request.input, str) else request.input
    if not 0 < len(sentences) <= TEXTS_MAX:
        message = f"{len(sentences)} texts; 1 to {TEXTS_MAX} are taken in one request"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "input")
    for i, sentence in enumerate(sentences):
        inputs = text_inputs(text, manifest, sentence, f"input.{i}")
        job.waiting.append((i, inputs))
        job.prompt_tokens += inputs[manifest.inputs[0].name].shape[1]
    return job
