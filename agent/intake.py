"""From a request's bytes to a job: opened, read, checked against the model and the plan, nothing sent or owed yet."""

import secrets

from agent.generation import Generation, prompt_ids
from agent.pipelinejob import PipelineJob, open_pipeline_job, task_of
from agent.replies import ReplyTo
from agent.tensorjob import TensorJob, open_job
from agent.urgency import urgency
from agent.usage import Meter
from bus.identity import Identity
from bus.sealed_requests import Asked
from bus.sealed_requests import open_request as unseal
from models.text import LONG_CHARS, Text
from schemas.base import DeploymentName, RequestId
from schemas.codec import REQUEST_ID, SEALED, decode_plain, media_type_of
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Manifest, ModelKind
from schemas.plan import Plan
from schemas.request import EmbeddingRequest, Request, TensorRequest, TextRequest, read_request
from schemas.slo import Slo

Job = Generation | TensorJob | PipelineJob


def opened(
    data: bytes, content_type: str, deployment: DeploymentName, named: RequestId | None, identity: Identity
) -> Asked:
    """What a message asks of `deployment`; `named` is the id beside it. Raises `ResplitError` for one that came sealed
    and does not open here."""
    if media_type_of(content_type) != SEALED:
        return Asked(data, content_type)
    if named is None:
        message = f"a sealed request names its id in the header {REQUEST_ID}, 1 to 64 of A-Z a-z 0-9 _ -"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, REQUEST_ID)
    return unseal(data, deployment, named, identity.name, identity.sealing)


def read(asked: Asked, named: RequestId | None) -> tuple[RequestId, Request]:
    """A request and its id, the client's or one drawn; raises `ResplitError`, also where a sealed one is not `named`
    as it says itself."""
    request = read_request(decode_plain(asked.data, asked.content_type, "request"))
    if asked.seal is not None and request.request_id != named:
        message = f"it says that its id is {request.request_id!r}, and was sealed as {named!r}; say the same"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "request_id")
    return request.request_id or RequestId(secrets.token_hex(8)), request


def promised(manifest: Manifest, plan: Plan, request: Request) -> Slo | None:
    """The class of requests that do not say otherwise: the deployment's, or that of its pipeline's task."""
    if manifest.pipeline is None:
        return plan.slo
    task = task_of(manifest.pipeline, request)
    return None if task is None else manifest.pipeline.tasks[task].slo


def takes_long(text: Text | None, request: Request, size_bytes: int) -> bool:
    """Whether opening a request of that size would hold an event loop up, unless `prepare` was called in a thread."""
    if text is None or isinstance(request, TensorRequest):
        return False
    return size_bytes > LONG_CHARS or (_is_constrained(request) and not text.knows_vocabulary)


def prepare(text: Text, request: Request) -> None:
    """What takes long of opening a request: its texts are encoded, the vocabulary is read; `text` remembers. Raises
    what `open_request` raises, which will raise it again."""
    if _is_constrained(request):
        text.learn_vocabulary()
    match request:
        case TextRequest(messages=messages) if messages is not None:
            text.encode_messages([message.model_dump() for message in messages], request.tools)
        case TextRequest(prompt=prompt) if prompt is not None:
            text.encode(prompt)
        case EmbeddingRequest(input=given):
            for one in (given,) if isinstance(given, str) else given:
                text.encode(one)
        case _:
            pass


def _is_constrained(request: Request) -> bool:
    return isinstance(request, TextRequest) and request.constraint is not None


def asked_for(manifest: Manifest, request: Request) -> str | None:
    """Of a pipeline, the task."""
    return None if manifest.pipeline is None else task_of(manifest.pipeline, request)


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
    slo = request.slo(promised(manifest, plan, request))
    deadline = None if slo.deadline_ms is None else arrived + slo.deadline_ms / 1e3
    if manifest.pipeline is not None:
        meter = Meter(arrived)
        conducted = open_pipeline_job(request, request_id, reply, plan.model, manifest, deadline, meter)
        conducted.slo, conducted.urgency = slo, urgency(slo, arrived)
        return conducted
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
        constrained=None if request.constraint is None else text.constrained(request.constraint),
    )
