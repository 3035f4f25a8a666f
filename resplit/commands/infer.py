"""`resplit infer`: ask a deployment and watch the tokens arrive, or give it tensors and texts."""

import asyncio
import sys
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resplit.defaults import DEFAULT_URL, IDLE_TIMEOUT_S
from resplit.options import AsJson, ClientKeys, Url
from resplit.output import print_json
from resplit.replies import Tensor, TensorResult, Token
from schemas.errors import ErrorCode, ResplitError

if TYPE_CHECKING:
    from resplit.access import Access
    from resplit.client import Client

SHOWN_MAX = 12
"""Values of an output in a line."""


def infer(
    deployment: Annotated[str, typer.Argument(help="The deployment to ask.")],
    keys: ClientKeys,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue, or with --chat to answer; `-` reads stdin.")
    ] = None,
    url: Url = DEFAULT_URL,
    sealed: Annotated[
        bool,
        typer.Option(
            "--sealed/--open",
            help="Seal the request, and so its answer, to the agents that the cluster's newest roster calls trusted.",
        ),
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Send PROMPT as a user's message to the chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=10, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the likeliest K; 0 from all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from the likeliest that sum to P.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    deadline_ms: Annotated[int | None, typer.Option(help="The last token must be out within so many ms.")] = None,
    ttft_ms: Annotated[float | None, typer.Option(help="Objective: the first token within so many ms.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(help="Objective: ms a token after the first.")] = None,
    priority: Annotated[int | None, typer.Option(help="Higher goes first; default: the deployment's.")] = None,
    edge_only: Annotated[
        bool, typer.Option("--edge-only", help="Never put it to a cloud outside, even if nothing here can answer.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Give up after so many seconds of silence.")] = IDLE_TIMEOUT_S,
    given: Annotated[
        list[str] | None,
        typer.Option(
            "--input", help="For a pipeline or a tensor model: NAME=text or, a tensor, NAME=@file.npy; may be repeated."
        ),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Of a pipeline: which of its tasks.")] = None,
    as_json: AsJson = False,
) -> None:
    """Complete PROMPT, printing tokens as they arrive (with --json one line of JSON per token), or have a pipeline or a
    tensor model work on what each --input gives, and print its outputs."""
    from resplit.access import Access  # noqa: PLC0415

    if (prompt is None) == (not given):
        message = "give PROMPT to a model that generates text, or --input NAME=VALUE to a pipeline or a tensor model"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "input" if prompt is not None else "prompt")
    if given:
        inputs = dict(read_input(one) for one in given)
        classed = {"deadline_ms": deadline_ms, "priority": priority, "parameters": task and {"task": task}}
        said = {name: value for name, value in classed.items() if value is not None}
        said |= {"edge_only": True} if edge_only else {}
        result = listed(asyncio.run(_ask_tensors(Access(url, keys), sealed, timeout, deployment, inputs, said)))
        print_json(result) if as_json else print_outputs(result)
        return
    assert prompt is not None
    text = sys.stdin.read() if prompt == "-" else prompt
    fields: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or None,
        "deadline_ms": deadline_ms,
        "ttft_ms": ttft_ms,
        "tpot_ms": tpot_ms,
        "priority": priority,
        "edge_only": edge_only or None,
    }
    fields |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    last = asyncio.run(_print_stream(Access(url, keys), sealed, timeout, deployment, fields, as_json))
    if not as_json and sys.stderr.isatty():
        print(_summary(last), file=sys.stderr)


def read_input(text: str) -> tuple[str, Tensor]:
    """NAME=text, or NAME=@file.npy; raises `ResplitError(INVALID_REQUEST)`."""
    import numpy as np  # noqa: PLC0415

    from schemas.pipeline import TEXT  # noqa: PLC0415
    from schemas.tensor import NUMPY_TO_OIP  # noqa: PLC0415

    name, equals, value = text.partition("=")
    if not name or not equals:
        message = f'{text!r} is no input such as question="what is this?" or image=@picture.npy'
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "input")
    if not value.startswith("@"):
        return name, Tensor((1,), TEXT, [value])
    try:
        array = np.load(value[1:], allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        message = f"{value[1:]} cannot be read as a .npy file: {error}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "input") from error
    if not isinstance(array, np.ndarray) or array.dtype.name not in NUMPY_TO_OIP:
        kind = getattr(getattr(array, "dtype", None), "name", type(array).__name__)
        message = f"{value[1:]} holds {kind}; tensors are of {', '.join(NUMPY_TO_OIP)}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "input")
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return name, Tensor(array.shape, NUMPY_TO_OIP[array.dtype.name], little.tobytes())


def listed(result: TensorResult) -> TensorResult:
    """The same with its tensors as lists."""
    from schemas.tensor import OIP_TO_NUMPY, view  # noqa: PLC0415

    def plain(name: str, tensor: Tensor) -> Tensor:
        if not isinstance(tensor.data, bytes):
            return tensor
        array = view(tensor.data, OIP_TO_NUMPY.get(tensor.datatype, ""), tensor.shape, f"outputs.{name}")
        return replace(tensor, data=array.reshape(-1).tolist())

    return replace(result, outputs={name: plain(name, tensor) for name, tensor in result.outputs.items()})


def print_outputs(result: TensorResult) -> None:
    """Each output in a line: its name, its type, its values, as many as a line holds."""
    for name, tensor in result.outputs.items():
        shown = ", ".join(one if isinstance(one, str) else f"{one:g}" for one in tensor.data[:SHOWN_MAX])
        more = f", ... ({len(tensor.data)})" if len(tensor.data) > SHOWN_MAX else ""
        print(f"{name} {tensor.datatype}{list(tensor.shape)}: {shown}{more}")


async def _ask_tensors(
    at: "Access", sealed: bool, timeout_s: float, deployment: str, inputs: dict[str, Tensor], fields: dict[str, Any]
) -> TensorResult:
    async with _client(at, sealed, timeout_s) as client:
        return await client.infer_tensors(deployment, inputs, **fields)


def _client(at: "Access", sealed: bool, timeout_s: float) -> "Client":
    from resplit.client import Client  # noqa: PLC0415
    from resplit.sealing import Sealer  # noqa: PLC0415

    login = dict(at.credentials("client").nats_options)
    return Client(at.url, nats_options=login, idle_timeout_s=timeout_s, sealer=Sealer(at.keys) if sealed else None)


async def _print_stream(
    at: "Access", sealed: bool, timeout_s: float, deployment: str, fields: dict[str, Any], as_json: bool
) -> Token:
    last: Token | None = None
    try:
        # aclosing: Ctrl-C cancels the request before the connection closes.
        async with (
            _client(at, sealed, timeout_s) as client,
            aclosing(client.stream(deployment, **fields)) as tokens,
        ):
            async for last in tokens:
                if as_json:
                    print_json(last)
                else:
                    print(last.text, end="", flush=True)
    finally:
        if last is not None and not as_json:
            print()
    assert last is not None
    return last


def _summary(last: Token) -> str:
    usage = last.usage
    assert usage is not None
    pace = "" if usage.tpot_ms is None else f", then {usage.tpot_ms:.1f} ms a token"
    first = "" if usage.ttft_ms is None else f", first after {usage.ttft_ms:.0f} ms{pace}"
    nodes = " > ".join(stage.node for stage in usage.stages)
    where = f"epoch {usage.epoch} on {nodes}" if usage.cloud is None else f"from cloud {usage.cloud.name}"
    return f"[{usage.completion_tokens} tokens ({last.finish_reason}){first}; {where}]"
