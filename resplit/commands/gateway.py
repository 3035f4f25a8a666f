"""`resplit gateway` serves HTTP; `resplit api-key` draws the keys that it lets in."""

import logging
import re
from pathlib import Path
from typing import Annotated

import typer

from resplit.defaults import DEFAULT_URL, IDLE_TIMEOUT_S
from resplit.options import AsJson, ClientKeys, Url, Verbose
from resplit.output import print_json
from schemas.base import NAME_PATTERN, NAME_RULE
from schemas.errors import ErrorCode, ResplitError

LISTEN = "127.0.0.1:8000"

ApiKeys = Annotated[
    Path | None,
    typer.Option("--api-keys", envvar="RESPLIT_API_KEYS", help="The file of API keys, made with `resplit api-key`."),
]


def gateway(
    keys: ClientKeys,
    url: Url = DEFAULT_URL,
    listen: Annotated[
        str,
        typer.Option(help="HOST:PORT to serve HTTP at; port 0 is any. A socket that systemd hands over goes before."),
    ] = LISTEN,
    watch_keys: Annotated[
        Path | None,
        typer.Option(
            envvar="RESPLIT_WATCH_KEYS",
            help="The folder of a member enrolled as an observer: for the list of models and the dashboard.",
        ),
    ] = None,
    api_keys: ApiKeys = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM; with it HTTPS is served.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM, the private key of the certificate.")] = None,
    open_to_all: Annotated[
        bool, typer.Option("--open", help="Listen beyond this machine without API keys, or without TLS.")
    ] = False,
    sealed: Annotated[
        bool, typer.Option("--sealed/--bare", help="Seal requests, and so their answers, to the agents trusted now.")
    ] = False,
    requests: Annotated[int, typer.Option(min=1, help="Requests that may run and wait at once; more get 429.")] = 512,
    timeout: Annotated[float, typer.Option(min=0.1, help="Give a request up after so many seconds of silence.")] = (
        IDLE_TIMEOUT_S
    ),
    drain: Annotated[int, typer.Option(min=0, help="Seconds that answers may go on once it is to stop.")] = 30,
    verbose: Verbose = False,
) -> None:
    """Serve the cluster over HTTP until Ctrl-C or SIGTERM: OpenAI's API at /v1, the Open Inference Protocol at /v2, a
    dashboard at /dashboard/, figures for Prometheus at /metrics."""
    from resplit.gateway.app import GatewayConfig  # noqa: PLC0415
    from resplit.gateway.serving import Listening, check, handed_over, parse_listen, serve  # noqa: PLC0415
    from resplit.running import log_to_stderr, run_service  # noqa: PLC0415

    host, port = handed_over() or parse_listen(listen)
    at = Listening(host, port, tls_certificate, tls_key, drain)
    config = GatewayConfig(
        url,
        keys,
        None if watch_keys is None else watch_keys.expanduser(),
        None if api_keys is None else api_keys.expanduser(),
        timeout,
        requests,
        sealed,
    )
    check(config, at, open_to_all)
    log_to_stderr(logging.INFO if verbose else logging.WARNING)
    run_service(serve(config, at, verbose))


def api_key(
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    file: Annotated[Path, typer.Option("--file", envvar="RESPLIT_API_KEYS", help="The file; made where it is not.")],
    model: Annotated[
        list[str] | None, typer.Option(help="A deployment that it may ask; may be repeated. Default: every one.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="It opens the dashboard and the metrics too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draw an API key and write its hash to a file that `resplit gateway --api-keys` reads. It is shown once. To take
    it back, delete its entry: a gateway that runs notices."""
    from resplit.gateway.api_keys import add_key  # noqa: PLC0415

    for one in (name, *(model or ())):
        if re.fullmatch(NAME_PATTERN, one) is None:
            raise ResplitError(ErrorCode.INVALID_REQUEST, f"{one!r}: {NAME_RULE}", "name")
    key = add_key(file.expanduser(), name, None if model is None else tuple(model), watch)
    if as_json:
        print_json({"name": name, "key": key})
    else:
        print(key)
