"""From a request's bytes to a job: read, checked against the model and the plan, nothing sent and nothing owed yet."""

import secrets

from agent.generation import Generation, prompt_ids
from agent.replies import ReplyTo
from agent.tensorjob import TensorJob, open_job
from agent.urgency import urgency
from agent.usage import Meter
from models.text import Text
from schemas.base import RequestId
from schemas.codec import decode_plain
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Manifest, ModelKind
from schemas.plan import Plan
from schemas.request import EmbeddingRequest, TensorRequest, TextRequest, read_request

Job = Generation | TensorJob
Request = TextRequest | EmbeddingRequest | TensorRequest


def read(data: bytes, content_type: str) -> tuple[RequestId, Request]:
    """A request and its id, the client's or one drawn; raises `ResplitError`."""
    request = read_request(decode_plain(data, content_type, "request"))
    return request.request_id or RequestId(secrets.token_hex(8)), request


def open_request(
    request: Request,
    request_id: RequestId,
    reply: ReplyTo,
    plan: Plan,
    manifest: Manifest,
    text: Text | None,
    arrived: float,
    seed: int | None = None,
) -> Job:
    """The job of a request that arrived at `arrived`, in the ingress' monotonic seconds.

    `seed` is one that an earlier ingress drew. Raises `ResplitError` naming the field at fault.
    """
    slo = request.slo(plan.slo)
    deadline = None if slo.deadline_ms is None else arrived + slo.deadline_ms / 1e3
    if not isinstance(request, TextRequest):
        call = open_job(request, request_id, reply, plan.model, manifest, text, deadline, Meter(arrived))
        call.slo, call.urgency = slo, urgency(slo, arrived)
        return call
    if manifest.kind is not ModelKind.DECODER:
        message = f"{manifest.name} does not generate text: send `input` (text) or `inputs` (tensors)"
        given = "prompt" if request.prompt is not None else "messages" if request.messages is not None else "token_ids"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, given)
    spec = manifest.text
    assert spec is not None
    assert text is not None
    context = min(spec.context_length, plan.settings.context_tokens)
    prompt = prompt_ids(request, text, spec, context)
    if seed is None:
        seed = request.seed if request.seed is not None else secrets.randbits(63)
    tokens = min(request.max_tokens, context - len(prompt))
    return Generation(
        request_id,
        request,
        reply,
        plan.model,
        prompt,
        tokens,
        frozenset(spec.eos_token_ids),
        seed,
        Meter(arrived),
        text,
        deadline,
        slo=slo,
        urgency=urgency(slo, arrived, tokens),
    )
