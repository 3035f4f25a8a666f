"""Every decoder of what comes from the network, as production calls it, with real messages of its kind.

`WHERE` says for each place in the code that reads bytes which of these goes through it; `test_decoders` keeps it whole.
"""

import io
import ssl
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from hashlib import sha256
from pathlib import Path

import msgpack
import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from nats.aio.client import Client as Nats
from pydantic import BaseModel, ValidationError

from agent.asking import reply_in
from agent.busroad import PIECE_TYPE, BusRoad
from agent.cloudwire import read_said
from agent.sampling import masked
from bus.blobs import piece_wanted
from bus.enrolment import enrol
from bus.folders import FIRST_ROOT, ROSTER
from bus.founding import found_cluster, load_holder
from bus.holders import replace_holders
from bus.hpke import block_info, unwrap, wrap
from bus.identity import ORCHESTRATOR
from bus.joining import unpack as unpack_bundle
from bus.letters import About, open_letter, seal_letter
from bus.sealed_heartbeats import open_heartbeat, read_capacity, read_hosting
from bus.sealed_plans import open_section
from bus.sealed_requests import open_request, seal_request
from bus.subject_log import MovedError, NoRoomError, UnsureError, read_answer
from models.sealing import FileContext, open_file, seal_file
from models.text import with_read_arguments
from resplit import exchange, replies
from resplit.cloudevents import as_line, envelopes
from resplit.control import read_reply
from resplit.gateway.api_keys import Door
from resplit.gateway.oip_bodies import read_body
from resplit.gateway.openai_requests import ChatRequest, CompletionRequest
from resplit.gateway.tool_calls import CallReader
from resplit.replies import RequestError
from resplit.standing import Reader, trust_of
from schemas import subjects
from schemas.base import DeploymentName, Digest, NodeId, RequestId
from schemas.capacity import Capacity
from schemas.codec import JSON, MSGPACK, decode, decode_as, decode_plain, encode
from schemas.control import DeployRequest, StatusReply
from schemas.envelope import AUDIT_TYPE, HEARTBEAT_TYPE, PLAN_TYPE, open_envelope, pae
from schemas.errors import ResplitError
from schemas.export import EXPORTED
from schemas.frame import Activation, Adopt, Close, Failure, Item, Move, Result, Sampling, StageTime, Token
from schemas.framing import pack, unpack
from schemas.heartbeat import Heartbeat, Hosting
from schemas.journal import Run, unpack_records
from schemas.known import after_roster, first_known
from schemas.plan import PlanEvent
from schemas.request import TextRequest, read_request
from schemas.roster import ROOT_TYPE
from schemas.section import EventSection, SealedEvent
from schemas.signed import countersign
from tests.cloud_jobs import embedding_job, generation, tensor_job
from tests.sealed_events import told, whole
from tests.security.recording import ADDER, KINDS, N0, N1, Recording, believed

MODEL = Digest("a" * 64)
KEY = bytes(range(32))
ABOUT = About("journal", DeploymentName("chat"), "r1", "n1")
UNSIGNED_FOLD, SIGNED_FOLD = 192, 400
"""Bytes of memory for each byte of a message: while nobody has vouched for it, and of what was signed. msgpack and JSON
write an empty array in one byte and two, and Python takes 64 for it; an error about a value holds it once more."""


REQUESTS = (
    b'{"prompt":"12+30=","max_tokens":4,"temperature":0.5,"stop":["a"],"stream":true,"request_id":"r1"}',
    b'{"messages":[{"role":"user","content":"Hello"}],"logprobs":3,"deadline_ms":100,"priority":-1}',
    b'{"prompt":"a","constraint":{"json_schema":{"type":"array","items":{"enum":[1,"a",null]}}}}',
    b'{"messages":[{"role":"user","content":"a"}],"tools":[{"type":"function","function":{"name":"f","parameters":{}}}]}',
    b'{"input":["text","text"]}',
    b'{"id":"a","inputs":[{"name":"x","shape":[1,3],"datatype":"INT64","data":[1,2,3]}],"outputs":[{"name":"y"}]}',
)
CLOUDS = (
    b'{"choices":[{"text":"b","finish_reason":"length"}],"usage":{"prompt_tokens":2,"completion_tokens":3}}',
    b'{"id":"1","choices":[{"message":{"role":"assistant","content":"c"},"finish_reason":"stop"}]}',
    b'{"data":[{"index":1,"embedding":[3,4]},{"index":0,"embedding":[1.0,2.0]}],"usage":{"prompt_tokens":2}}',
    b'{"model_name":"m","outputs":[{"name":"y","shape":[1,2],"datatype":"FP32","data":[1.0,2.5]}]}',
)
_USAGE = {"prompt_tokens": 1, "completion_tokens": 0, "total_tokens": 1, "queued_ms": 0.1, "total_ms": 2.5,
          "network_ms": 0.1, "epoch": 1, "route": 0, "stages": []}  # fmt: skip
OIP_JSON = (
    b'{"id":"a","inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","data":[[1,2,3]]}],"outputs":[{"name":"y"}]}'
)
OIP_BINARY = (
    b'{"inputs":[{"name":"x","shape":[3],"datatype":"FP32","parameters":{"binary_data_size":12}},'
    b'{"name":"t","shape":[1],"datatype":"BYTES","parameters":{"binary_data_size":5}}]}'
)
ANSWERS = (
    {"request_id": "r1", "status": "accepted", "deployment": "chat", "epoch": 1},
    {"request_id": "r1", "error": {"code": "overloaded", "message": "try again later"}, "refused": True},
    {"request_id": "r1", "data": [{"index": 0, "embedding": [0.5, -0.5]}], "usage": _USAGE},
    {"request_id": "r1", "id": "a", "model_name": "m", "usage": _USAGE,
     "outputs": [{"name": "y", "shape": [1, 2], "datatype": "FP32", "raw": bytes(8)}]},
)  # fmt: skip
_SAMPLED = Sampling(0.5, 3, 0.9, 0.1, 7, 2)
FRAMES = tuple(
    b"".join(pack(frame))
    for frame in (
        Activation(
            "d", 1, 0, 1, "decode", (Item(1, 2, 3, 1, True, 0, 64, _SAMPLED, zlib.compress(b"\x03")),),
            {"x": np.ones((1, 1, 8), np.float32)}, "n0", (StageTime(0, 5, 6),),
        ),
        Result("d", 1, 0, (Token(1, 2, 0, 7, -0.5, ((7, -0.5),)),), ((1, 2),), {}, "n0", ()),
        Close("d", 1, 0, 1, (1, 2)),
        Failure("d", 1, 0, (1,), "n0", "step_lost", "gone"),
        Adopt("d", 1, 2, 0, "n0", 1, 64, 128, _SAMPLED, (Move(0, 3, "n1"),), True),
    )
)  # fmt: skip


@dataclass(frozen=True)
class Decoder:
    """One way in: what reads the bytes, real ones, and the errors that are its answer to others."""

    read: Callable[[bytes], object]
    samples: tuple[bytes, ...]
    refuses_with: tuple[type[Exception], ...] = (ResplitError,)
    fold: int = UNSIGNED_FOLD
    """How many bytes of memory a byte of a message may take."""


WHERE: dict[str, str] = {
    "schemas/codec.py:decode": "value",
    "schemas/codec.py:decode_as": "text request",
    "schemas/codec.py:decode_plain": "plain",
    "schemas/envelope.py:open_envelope": "envelope",
    "schemas/flat.py:check_announced": "frame",
    "schemas/flat.py:read_flat": "envelope",
    "schemas/framing.py:unpack": "frame",
    "schemas/journal.py:unpack_records": "journal",
    "schemas/request.py:read_request": "request",
    "schemas/roster.py:public_key": "root",
    "schemas/roster.py:_whole": "roster",
    "schemas/roster.py:sealing_key": "roster",
    "schemas/sealed.py:Wrap.data": "value",
    "schemas/signed.py:_unpacked": "roster",
    "schemas/signed.py:documents": "roster behind a root",
    "schemas/tensor.py:view": "frame",
    "bus/blobs.py:piece_wanted": "piece of a file",
    "bus/identity.py:Identity.peer": "certificate",
    "bus/joining.py:_checked_tls": "bundle",
    "bus/letters.py:emptied": "letter",
    "bus/letters.py:_parts": "letter",
    "bus/letters.py:_readers": "letter",
    "bus/letterbox.py:_bytes": "sealed event",
    "bus/sealed_requests.py:open_request": "sealed request",
    "bus/sealed_requests.py:_unpacked": "sealed run",
    "bus/subject_log.py:read_answer": "answer of the stream",
    "agent/asking.py:reply_in": "reply to an agent",
    "agent/busroad.py:BusRoad._opened": "piece of a frame",
    "agent/cloudwire.py:read_said": "answer of a cloud",
    "agent/sampling.py:masked": "mask of tokens",
    "models/text.py:_with_values": "conversation",
    "resplit/gateway/api_keys.py:_key_in": "authorization",
    "resplit/gateway/oip_bodies.py:read_body": "tensors over HTTP",
    "resplit/gateway/oip_bodies.py:_texts": "tensors over HTTP",
    "resplit/gateway/tool_calls.py:CallReader._calls": "calls in an answer",
    "resplit/cloudevents.py:envelopes": "line of an export",
    "resplit/exchange.py:_decode": "reply",
    "resplit/exchange.py:_unpacked": "reply",
    "resplit/standing.py:_claimed": "event of the trail",
    "resplit/standing.py:signature_of": "line of an export",
    "models/sealing.py:_Sealed.__init__": "sealed file",
}
"""By decoder, as `decoders` calls them."""
NOT_FROM_THE_NETWORK = {
    "schemas/sealed.py:ModelKeys.key": "the keys beside the orchestrator's own store",
    "models/sealer.py:_sealed": "keys that this process drew",
    "bus/audit.py:AuditTrail._acknowledged": "a digest that this process made",
    "bus/blobs.py:size_of": "eight bytes, and bounded",
    "bus/cluster_folder.py:open_cluster": "the cluster's own folder",
    "bus/server_certificate.py:_read": "the cluster's own folder",
    "agent/links.py:Link.answered": "eight bytes of a pong, looked up",
    "agent/links.py:_Framed.data_received": "a length, bounded; tests/integration/test_crossing.py has real links",
    "agent/links.py:_Framed.is_moving": "the kernel's word",
    "agent/memory.py:_pages": "the kernel's word",
    "resplit/chain.py:Verifier._accept": "a digest that was decoded as one",
    "resplit/server.py:NatsServer._listens": "a file that our nats-server wrote",
    "resplit/topology.py:read_topology": "the operator's own file",
    "schemas/toml.py:document": "the operator's own file",
    "schemas/toml.py:validated": "the operator's own file",
    "models/hugging_face.py:check_weights": "the operator's own file",
    "models/text_files.py:read_json": "the operator's own file",
    "models/text_files.py:_pooling": "the operator's own file",
}
"""What else turns bytes into values, and why it is not here."""


def decoders(recording: Recording, folder: Path) -> dict[str, Decoder]:
    """By name; `folder` is for what has to be made."""
    n0 = recording.identity(N0)
    genuine = recording.envelopes(n0)
    some = {kind: data[:3] + data[-3:] for kind, data in genuine.items()}
    said = {
        name: tuple(data for subject, data in recording.said if subject.startswith(f"{subjects.ROOT}.{name}"))
        for name in ("infer", "journal", "control.deploy")
    }
    now = datetime.now(UTC)
    found_cluster(folder / "cluster", now=now)
    holder = [load_holder(folder / "cluster" / "root-0.key")]
    bundle = enrol(folder / "cluster", NodeId("n9"), "agent", "edge", timedelta(days=1), holder, now=now)
    replace_holders(folder / "cluster", holder, staying=(), added=1, threshold=1, now=now)
    first, behind = ((folder / "cluster" / file).read_bytes() for file in (FIRST_ROOT, ROSTER))
    root = (recording.keys / "cluster" / FIRST_ROOT).read_bytes()
    me = X25519PrivateKey.generate()
    letter = seal_letter(b"owed" * 40, {N0: me.public_key(), N1: me.public_key()}, ABOUT)
    about_block = block_info("home", MODEL, 1, N0)
    context = FileContext(MODEL, 2, Digest(sha256(bytes(3000)).hexdigest()))
    sealed = io.BytesIO()
    seal_file(io.BytesIO(bytes(3000)), sealed, KEY, context, 1024)
    road = BusRoad(Nats(), n0, lambda *_: None, lambda _: None, lambda _: None)
    about_piece = About("activation", DeploymentName("-"), "7.0.1", N1)
    in_piece = seal_letter(b"x" * 100, {N0: n0.sealing.public_key()}, about_piece)
    piece = msgpack.packb([N1, N0, 7, 0, 1, in_piece])
    asked, seal = seal_request(b'{"prompt":"x"}', JSON, ADDER, RequestId("r1"), {N0: me.public_key()})
    run = seal.seal_run(Run(0, 0, (7, 9), ((-0.5, ((7, -0.5),)), (None, ()))))
    signer, leader = recording.identity(N1), recording.identity(ORCHESTRATOR)
    beats = [open_heartbeat(data, n0) for data in genuine[HEARTBEAT_TYPE]]
    text = b'{"request_id":"r","index":0,"token_id":7,"text":"3","top_logprobs":[{"token_id":7,"logprob":-0.5}]}'
    known = first_known(root)
    kinds: tuple[type[BaseModel], ...] = EXPORTED
    samples: dict[type[BaseModel], tuple[bytes, ...]] = {
        **{held: tuple(msgpack.unpackb(data)[1] for data in some[kind]) for kind, held in KINDS.items()},
        PlanEvent: tuple(encode(whole(data, leader)) for data in some[PLAN_TYPE]),
        EventSection: tuple(encode(told(data, node)) for data in some[PLAN_TYPE] for node in (n0, signer)),
        Capacity: tuple(encode(one) for beat in beats if (one := read_capacity(beat, leader)) is not None)[-3:],
        Hosting: tuple(encode(part) for beat in beats if (part := read_hosting(beat, n0)) is not None)[-3:],
        DeployRequest: tuple(filter(None, said["control.deploy"])),
    }
    return {
        **{
            f"value {kind.__name__}": Decoder(
                partial(_value, kind),
                samples.get(kind, (b"{}",)),
                fold=_fold(kind),
            )
            for kind in kinds
        },
        "plain": Decoder(lambda data: decode_plain(data, JSON, "test"), said["infer"]),
        "plain msgpack": Decoder(
            lambda data: decode_plain(data, MSGPACK, "test"), (msgpack.packb({"a": [1, {"b": None}]}),)
        ),
        "text request": Decoder(
            lambda data: decode_as(TextRequest, data, MSGPACK, "test"), (msgpack.packb({"prompt": "x", "stop": ["a"]}),)
        ),
        "request": Decoder(lambda data: read_request(decode_plain(data, JSON, "request")), (*said["infer"], *REQUESTS)),
        "request msgpack": Decoder(
            lambda data: read_request(decode_plain(data, MSGPACK, "request")),
            tuple(msgpack.packb(decode_plain(r, JSON, "")) for r in REQUESTS),
        ),
        "reply of the orchestrator": Decoder(
            lambda data: read_reply(data, StatusReply),
            (b'{"error":{"code":"internal","message":"x"}}',),
            fold=SIGNED_FOLD,
        ),
        "frame": Decoder(unpack, FRAMES),
        "journal": Decoder(unpack_records, said["journal"][:8]),
        "envelope": Decoder(
            lambda data: open_envelope(data, SealedEvent, PLAN_TYPE, believed(n0, PLAN_TYPE)), some[PLAN_TYPE]
        ),
        "sealed event": Decoder(
            lambda data: open_section(decode(SealedEvent, data, "test"), ORCHESTRATOR, n0),
            tuple(msgpack.unpackb(data)[1] for data in some[PLAN_TYPE]),
            fold=SIGNED_FOLD,
        ),
        "heartbeat": Decoder(
            lambda data: read_capacity(decode(Heartbeat, data, "test"), leader),
            tuple(msgpack.unpackb(data)[1] for data in some[HEARTBEAT_TYPE]),
            fold=SIGNED_FOLD,
        ),
        "roster": Decoder(lambda data: after_roster(known, data, now), (recording.roster,)),
        "root": Decoder(first_known, (root,)),
        "roster behind a root": Decoder(lambda data: after_roster(first_known(first), data, now), (behind,)),
        "countersigned": Decoder(lambda data: countersign(data, ROOT_TYPE, {}), (root,)),
        "bundle": Decoder(unpack_bundle, (bundle,)),
        "letter": Decoder(lambda data: open_letter(data, N0, me, ABOUT), (letter,)),
        "sealed request": Decoder(lambda data: open_request(data, ADDER, RequestId("r1"), N0, me), (asked,)),
        "sealed reply": Decoder(seal.open_reply, (seal.seal_reply(b'{"text":"x"}'),)),
        "sealed run": Decoder(lambda data: seal.open_run(replace(run, box=data)), (run.box,)),
        "wrap": Decoder(lambda data: unwrap(data, me, about_block), (wrap(KEY, me.public_key(), about_block),)),
        "sealed file": Decoder(lambda data: list(open_file(io.BytesIO(data), KEY, context)), (sealed.getvalue(),)),
        "piece of a file": Decoder(piece_wanted, (msgpack.packb([0, 524288]),)),
        "piece of a frame": Decoder(road._opened, (signer.key.sign(pae(PIECE_TYPE, piece)) + piece,), ()),
        "certificate": Decoder(n0.peer, (_certificate(recording),), ()),
        "answer of the stream": Decoder(
            read_answer,
            (b'{"stream":"A","seq":7}', b'{"error":{"code":400,"err_code":10071,"description":"wrong last sequence"}}'),
            (MovedError, NoRoomError, UnsureError),
        ),
        "event of the trail": Decoder(Reader(trust_of(n0.roster)).read, some[AUDIT_TYPE], fold=SIGNED_FOLD),
        "line of an export": Decoder(
            lambda data: list(envelopes([data.decode(errors="replace")])),
            tuple(as_line(data).encode() for data in some[AUDIT_TYPE]),
            fold=SIGNED_FOLD,
        ),
        "answer of a cloud": Decoder(lambda data: read_said(data, generation()), CLOUDS[:2]),
        "vectors of a cloud": Decoder(lambda data: read_said(data, embedding_job(["a", "b"], 2)), CLOUDS[2:3]),
        "tensors of a cloud": Decoder(lambda data: read_said(data, tensor_job()), CLOUDS[3:]),
        "mask of tokens": Decoder(
            lambda data: masked(np.zeros(17, np.float32), data), (zlib.compress(b"\xff\x01\x00\x00"),)
        ),
        "conversation": Decoder(
            lambda data: with_read_arguments(
                {"tool_calls": [{"function": {"name": "f", "arguments": data.decode(errors="replace")}}]}
            ),
            (b'{"a":[1,2]}',),
        ),
        "authorization": Decoder(
            lambda data: Door(None).opened_by(data.decode(errors="replace")), (b"Bearer rsp-x", b"Basic bWU6cnNwLXg=")
        ),
        "tensors over HTTP": Decoder(lambda data: read_body(data, None), (OIP_JSON,), (RequestError,)),
        "tensors over HTTP, binary": Decoder(
            lambda data: read_body(data, str(min(len(data), len(OIP_BINARY)))),
            (OIP_BINARY + bytes(12) + b"\x01\x00\x00\x00a",),
            (RequestError,),
        ),
        "chat over HTTP": Decoder(
            ChatRequest.model_validate_json,
            (
                b'{"model":"a","messages":[{"role":"user","content":[{"type":"text","text":"b"}]}],"stop":["c"],"n":2,'
                b'"tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object"}}}]}',
            ),
            (ValidationError,),
        ),
        "texts over HTTP": Decoder(
            CompletionRequest.model_validate_json, (b'{"model":"a","prompt":[[1,2],[3]]}',), (ValidationError,)
        ),
        "calls in an answer": Decoder(
            lambda data: CallReader(["f"], "r").push(data.decode(errors="replace")),
            (b'<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>',),
        ),
        "reply to an agent": Decoder(lambda data: reply_in(data, MSGPACK), tuple(map(msgpack.packb, ANSWERS))),
        "reply": Decoder(lambda data: _reply(data, JSON), (text,), (RequestError,)),
        "reply msgpack": Decoder(
            lambda data: _reply(data, MSGPACK), (msgpack.packb(decode_plain(text, JSON, "")),), (RequestError,)
        ),
    }


def _value(kind: type[BaseModel], data: bytes) -> object:
    return encode(decode(kind, data, "test"))


def _fold(kind: type[BaseModel]) -> int:
    return UNSIGNED_FOLD if kind.__name__.endswith("Request") else SIGNED_FOLD


def _certificate(recording: Recording) -> bytes:
    pem = (recording.keys / N1 / f"{N1}.tls.pem").read_text()
    return ssl.PEM_cert_to_DER_cert(pem)


def _reply(data: bytes, content_type: str) -> object:
    """As a client reads a reply: an error, a token, or an answer of another kind."""
    plain = exchange.read(exchange._decode, (data, content_type), "r")
    exchange.read(lambda reply: replies.read_error(reply, "r"), plain, "r")
    for reader in (replies.read_embeddings, replies.read_tensors):
        try:
            return exchange.read(reader, plain, "r")
        except RequestError:
            continue
    return exchange.read(replies.read_token, plain, "r")
