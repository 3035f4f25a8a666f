"""docs/mathematics.md says what the code computes: its sections, modules and constants, and the formulas of a route."""

import importlib
import re
from math import ceil, exp, floor
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.beliefs import SMOOTHING_S
from orchestrator.trigger import MARGIN
from profiler.cost import predict
from profiler.host import hosts_of
from profiler.objective import Demand, Weights
from schemas.base import NodeId
from schemas.capacity import BlockTime, Capacity, LinkEstimate
from schemas.deployment import Settings, Stage
from schemas.plan import Route
from tests.unit.test_profiler_cost import MODEL, capacity, decoder

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "mathematics.md").read_text()
PACKAGES = ("agent", "bus", "models", "orchestrator", "profiler", "schemas", "simulator", "tests")
CITED = re.compile(r"mathematics\.md`?,? (?:part )?(A[1-5](?:\.\d)?|B[1-5]|C[1-3]|D)\b")
CONSTANT = re.compile(r"^\| `([\w.]+)` \| ([\d.]+) \|", re.MULTILINE)
NODES = (NodeId("a"), NodeId("b"), NodeId("c"))


def test_every_section_that_the_code_cites_is_there() -> None:
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.suffix in (".py", ".toml")]
    cited = {section for path in sources for section in CITED.findall(path.read_text())}
    assert cited >= {"A1", "A2", "A3", "A4", "A5", "B1", "B2", "B3", "C1", "C2", "C3", "D"}
    assert [s for s in cited if not re.search(rf"^(## |\*\*){re.escape(s)} ", PAGE, re.MULTILINE)] == []


def test_every_module_it_names_is_there() -> None:
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", PAGE))
    there = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert [name for name in named if not any(path == name or path.endswith(f"/{name}") for path in there)] == []


@pytest.mark.parametrize(("name", "value"), CONSTANT.findall(PAGE), ids=str)
def test_every_constant_is_what_it_says(name: str, value: str) -> None:
    parts = name.split(".")
    split = next(k for k, part in enumerate(parts) if not part.islower())
    found: object = importlib.import_module(".".join(parts[:split]))
    for part in parts[split:]:
        found = getattr(found, part)
    assert found == float(value)


def test_the_margin_is_above_what_smoothing_leaves_of_noise() -> None:
    # The arithmetic of A4, in full: 20 % of noise a second, smoothed, on a difference of two.
    weight = 1 - exp(-1 / SMOOTHING_S)
    left = 0.2 * (weight / (2 - weight)) ** 0.5
    assert round(left, 2) == 0.08
    assert round(left * 2**0.5, 2) == 0.11 < MARGIN


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False))
def test_a_route_costs_what_the_formulas_of_a1_say(random: Random) -> None:
    draw, pick = random.uniform, random.choice
    same_machine = pick([True, False])
    nodes: dict[NodeId, Capacity] = {}
    for name in NODES:
        measured = tuple(
            BlockTime(
                model=MODEL,
                block=block,
                decode_ms=draw(1, 20),
                prefill_ms_per_token=draw(0.01, 1),
                prefill_ms=draw(0, 5),
                decode_ms_per_row=draw(0, 3),
                rows_min=pick([1, 2, 4]),
                decode_ms_per_context_token=draw(0, 0.02),
            )
            for block in range(3)
        )
        links = tuple(
            LinkEstimate(peer=peer, rtt_ms=draw(0.1, 20), direct=True, goodput_bytes_per_s=draw(1e6, 1e8))
            for peer in NODES
            if peer != name
        )
        where = {"machine": "m", "cores": (0, 1), "threads": 2} if same_machine and name != "c" else {}
        nodes[name] = capacity(name, block_times=measured, links=links, frame_ms=draw(0, 1), **where)
    stages = tuple(Stage(node=node, first=block, last=block) for block, node in enumerate(NODES))
    batch, depth, size = pick([1, 2, 3, 8]), pick([1, 2, 3]), pick([16, 128])
    demand = Demand(pick([0.0, 0.1, 2.0, 50.0]), pick([1, 16, 128]), batch, pick([0.0, 300.0]))
    prompt, cached = pick([1, 16, 100, 500]), pick([0, 64])
    found = predict(
        Route(index=0, source=NODES[0], stages=stages, max_sequences=1),
        hosts_of(nodes, decoder(), MODEL),
        decoder(),
        prompt,
        cached_tokens=cached,
        demand=demand,
        settings=Settings(chunk_tokens=size, pipeline_depth=depth),
        trusted=frozenset({NODES[0]}),
    )

    # From here on the words of A1.
    times = [nodes[node].block_times[block] for block, node in enumerate(NODES)]

    def step(time: BlockTime, rows: float) -> float:
        context = cached + prompt + demand.output_tokens / 2
        rows = max(1, rows, time.rows_min)
        b, g = time.decode_ms_per_row or 0.0, time.decode_ms_per_context_token
        return max(0, time.decode_ms + b * (rows - time.rows_min) + g * rows * (context - 128))

    chunks = max(1, ceil(prompt / size))
    last = prompt - (chunks - 1) * size
    groups = max(1, min(depth, floor(batch)))
    rows = batch / groups
    d = [step(time, rows) for time in times]
    p = [chunks * time.prefill_ms + prompt * time.prefill_ms_per_token for time in times[:2]]
    p.append(times[2].prefill_ms + last * times[2].prefill_ms_per_token)
    frames = sum(nodes[node].frame_ms or 0.0 for node in NODES)

    def edge(here: NodeId, there: NodeId) -> tuple[float, float]:
        out = next(link for link in nodes[here].links if link.peer == there)
        back = next(link for link in nodes[there].links if link.peer == here)
        return max(out.rtt_ms, back.rtt_ms) / 2, out.goodput_bytes_per_s or 0.0

    h = big_h = 0.0
    # The boundary of this model is 256 floats of 4 bytes; a token that returns has 8.
    for here, there, each, tokens in (("a", "b", 1024, prompt), ("b", "c", 1024, prompt), ("c", "a", 8, 1)):
        empty, rate = edge(NodeId(here), NodeId(there))
        h += empty + 1e3 * rows * each / rate
        big_h += chunks * empty + 1e3 * tokens * each / rate
    resource = [0, 0, 2] if same_machine else [0, 1, 2]

    def busiest(parts: list[float]) -> float:
        return max(sum(part for part, on in zip(parts, resource, strict=True) if on == k) for k in resource)

    step0 = sum(d) + h + frames
    step1 = max(step0, groups * busiest(d))
    chunk = (sum(p) + big_h) / chunks + frames
    pace = max(chunk / max(1, min(depth, chunks)), busiest([part / chunks for part in p]))
    shared = [k for k in range(3) if resource[k] == resource[(k + 1) % 3]] if batch > 1 else []
    between = (chunks - 0.5) * sum(step(times[k], batch - 1) for k in shared)
    whole = chunk + (chunks - 1) * min(chunk, pace) + between
    sigma = min(demand.requests_per_s * whole / 1000, 0.95)
    tpot = step1
    if sigma > 0:
        tpot = max(step1, 1 / ((1 - sigma) / step1 + sigma * chunks / whole))
    assert found.ttft_ms == pytest.approx(whole * (1 + demand.ahead_tokens / prompt + sigma / (1 - sigma)))
    assert found.tpot_ms == pytest.approx(tpot)
    e2e = found.ttft_ms + (demand.output_tokens - 1) * found.tpot_ms
    assert found.latency_ms == pytest.approx(e2e / demand.output_tokens)
    rho = [demand.requests_per_s * (p[k] + demand.output_tokens * d[k] / rows) / 1000 for k in range(3)]
    assert [node.rho for node in found.nodes] == pytest.approx(rho)
    u = sum(abs(one - sum(rho) / 3) for one in rho) / 3 + 5 * sum(max(one - 0.7, 0) for one in rho)
    # Blocks 1 and 2 are not trusted, and the cut after block 0 leaves trust.
    privacy = 0.5 + 1 + 1
    objective = found.objective(10.0, Weights())
    assert objective.phi == pytest.approx(found.latency_ms / 10 + 0.2 * u + privacy)
