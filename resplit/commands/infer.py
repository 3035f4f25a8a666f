"""`resplit infer`: ask a deployment and watch the tokens arrive."""

import asyncio
import sys
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resplit.defaults import DEFAULT_URL, IDLE_TIMEOUT_S
from resplit.options import AsJson, ClientKeys, Url
from resplit.output import print_json
from resplit.replies import Token

if TYPE_CHECKING:
    from resplit.access import Access


def infer(
    deployment: Annotated[str, typer.Argument(help="The deployment to ask.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue, or with --chat to answer; `-` reads stdin.")],
    keys: ClientKeys,
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
    timeout: Annotated[float, typer.Option(min=0.1, help="Give up after so many seconds of silence.")] = IDLE_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Complete PROMPT, printing tokens as they arrive (with --json one line of JSON per token)."""
    from resplit.access import Access  # noqa: PLC0415

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
    }
    fields |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    last = asyncio.run(_print_stream(Access(url, keys), sealed, timeout, deployment, fields, as_json))
    if not as_json and sys.stderr.isatty():
        print(_summary(last), file=sys.stderr)


async def _print_stream(
    at: "Access", sealed: bool, timeout_s: float, deployment: str, fields: dict[str, Any], as_json: bool
) -> Token:
    from resplit.client import Client  # noqa: PLC0415
    from resplit.sealing import Sealer  # noqa: PLC0415

    login = dict(at.credentials("client").nats_options)
    sealer = Sealer(at.keys) if sealed else None
    last: Token | None = None
    try:
        # aclosing: Ctrl-C cancels the request before the connection closes.
        async with (
            Client(at.url, nats_options=login, idle_timeout_s=timeout_s, sealer=sealer) as client,
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
    return f"[{usage.completion_tokens} tokens ({last.finish_reason}){first}; epoch {usage.epoch} on {nodes}]"
