"""`/v2`: the Open Inference Protocol over HTTP, its binary tensors included. A model is a deployment, by its name."""

import json
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from resplit.gateway.connections import while_there
from resplit.gateway.house import check_model, house_of, unknown_model
from resplit.gateway.oip_bodies import BINARY, LENGTH, read_body, reply_body
from schemas.control import DeploymentStatus

routes = APIRouter(prefix="/v2")

READY = ("cold", "serving", "changing", "degraded")
"""States in which requests are taken."""


@routes.get("")
@routes.get("/", include_in_schema=False)
async def server() -> dict[str, Any]:
    """Which server this is."""
    return {"name": "resplit", "version": version("resplit"), "extensions": ["binary_tensor_data"]}


@routes.get("/health/live")
async def live() -> dict[str, bool]:
    """That the gateway runs."""
    return {"live": True}


@routes.get("/health/ready")
async def ready(request: Request) -> Response:
    """Whether the gateway is connected to the cluster."""
    connected = house_of(request).answering.client.is_connected
    return JSONResponse({"ready": connected}, 200 if connected else 503)


@routes.get("/models/{name:path}/ready")
async def model_ready(request: Request, name: str) -> Response:
    """Whether a deployment takes requests."""
    found = await _status_of(request, name)
    is_ready = found is None or found.state in READY
    return JSONResponse({"name": name, "ready": is_ready}, 200 if is_ready else 503)


@routes.get("/models/{name:path}")
async def metadata(request: Request, name: str) -> dict[str, Any]:
    """What is known of a deployment. Shapes stand in the manifest of its model, which a gateway does not have."""
    found = await _status_of(request, name)
    current = None if found is None else found.current
    return {
        "name": name,
        "versions": [] if current is None else [str(current.epoch)],
        "platform": "onnx_resplit",
        "inputs": [],
        "outputs": [],
    }


@routes.post("/models/{name:path}/infer")
async def infer(request: Request, name: str) -> Response:
    """One inference."""
    answering = house_of(request).answering
    check_model(request, name)
    asked = read_body(await request.body(), request.headers.get(LENGTH))

    async def work() -> Response:
        async with answering.admitted("infer", name):
            found = await answering.client.infer_tensors(name, asked.inputs, asked.outputs, **asked.fields)
        head, blob = reply_body(name, found, asked)
        data = json.dumps(head, ensure_ascii=False).encode()
        if not blob:
            return Response(data, media_type="application/json")
        return Response(data + blob, media_type=BINARY, headers={LENGTH: str(len(data))})

    return await while_there(request, work())


async def _status_of(request: Request, name: str) -> DeploymentStatus | None:
    """A deployment as the orchestrator sees it; None where the gateway sees no cluster."""
    check_model(request, name)
    watch = house_of(request).watch
    if watch is None:
        return None
    for found in (await watch.status()).deployments:
        if found.name == name:
            return found
    raise unknown_model(name)
