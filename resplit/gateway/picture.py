"""PURE: what the dashboard draws: the orchestrator's view and the audit trail, cut down to what is seen.

What requests met is taken from the heartbeats, where each finished request stands once or more under one number: the
page counts it once by `key`. A picture has figures and names in it, and no content of a request.
"""

from typing import Any

from resplit.standing import Seen
from resplit.view import REASONS, attained, node_state, remarks
from schemas.capacity import Capacity
from schemas.control import DeploymentStatus, NodeStatus, StatusReply
from schemas.plan import Plan

Json = dict[str, Any]


def look_json(reply: StatusReply, at: float) -> Json:
    """One look at the cluster, at `at` seconds since 1970."""
    return {
        "at": at,
        "leader": None if reply.leader is None else reply.leader.leader,
        "term": reply.term,
        "standbys": list(reply.standbys),
        "nodes": [_node(node, reply.drained) for node in reply.nodes],
        "links": [link for node in reply.nodes if not node.lost for link in _links(node.capacity)],
        "deployments": [_deployment(found) for found in reply.deployments],
        "finished": [one for node in reply.nodes for one in _finished(node.capacity)],
    }


def event_json(seen: Seen) -> Json:
    """One event of the trail, with how far it may be believed."""
    event = seen.event
    why = next((str(event.fields[name]) for name in REASONS if event.fields.get(name)), None)
    return {
        "at": event.at.timestamp(),
        "source": event.source,
        "kind": event.kind.value,
        "message": event.message,
        "deployment": event.deployment,
        "epoch": event.epoch,
        "request": event.request,
        "why": why,
        "fields": {name: value for name, value in event.fields.items() if value is not None and name not in REASONS},
        "standing": seen.standing,
    }


def _node(node: NodeStatus, drained: tuple[str, ...]) -> Json:
    capacity = node.capacity
    return {
        "name": capacity.node,
        "state": node_state(node, drained),
        "lost": node.lost,
        "trusted": node.trusted,
        "tier": capacity.tier,
        "device": f"{capacity.provider.name} ({capacity.provider.device})",
        "threads": capacity.threads,
        "load": capacity.load,
        "gpu_load": capacity.gpu_load,
        "memory_free": capacity.memory_free_bytes,
        "memory_total": capacity.memory_total_bytes,
        "disk_free": capacity.disk_free_bytes,
        "temperature": capacity.temperature_c,
        "power": capacity.power_w,
        "age": round(node.age_s, 1),
        "sequences": sum(stage.sequences for stage in capacity.stages),
    }


def _links(capacity: Capacity) -> list[Json]:
    return [
        {
            "from": capacity.node,
            "to": link.peer,
            "rtt_ms": link.rtt_ms,
            "bytes_per_s": link.goodput_bytes_per_s,
            "direct": link.direct,
            "up": link.up,
        }
        for link in capacity.links
    ]


def _deployment(found: DeploymentStatus) -> Json:
    return {
        "name": found.name,
        "model": found.model_name,
        "state": found.state,
        "remarks": remarks(found),
        "current": None if found.current is None else _plan(found.current),
        "candidate": None if found.candidate is None else _plan(found.candidate),
        "draining": [_plan(plan) for plan in found.draining],
        "ready": list(found.ready),
        "estimate": found.estimate,
        "attained": None if found.attainment is None else attained(found),
        "slo": None if found.attainment is None else found.attainment.share,
        "prediction": found.prediction,
    }


def _plan(plan: Plan) -> Json:
    return {
        "epoch": plan.epoch,
        "blocks": plan.block_count,
        "cold": plan.cold,
        "reason": plan.reason,
        "routes": [[[stage.node, stage.first, stage.last] for stage in route.stages] for route in plan.routes],
    }


def _finished(capacity: Capacity) -> list[Json]:
    return [
        {
            "key": f"{capacity.node} {capacity.boot} {one.number}",
            "deployment": one.deployment,
            "epoch": one.epoch,
            "ttft_ms": one.ttft_ms,
            "tpot_ms": one.tpot_ms,
            "output_tokens": one.output_tokens,
        }
        for one in capacity.finished
    ]
