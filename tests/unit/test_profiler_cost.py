"""KV length classes and the cost model's terms."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from profiler import compute, cost, memory, network
from profiler.forecast import forecast
from profiler.host import hosts_of
from profiler.kv import ALIGNMENT_TOKENS, kv_tokens, length_classes
from profiler.objective import Demand, Weights, imbalance, queue_wait_ms
from schemas.base import Digest, NodeId
from schemas.capacity import REFERENCE_CONTEXT_TOKENS, BlockTime, Capacity, LinkEstimate, Provider
from schemas.deployment import DEFAULT_CHUNK_TOKENS, Settings, Stage
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import BlobRef, Block, KvCache, Manifest, ModelKind, TensorSpec, TextSpec
from schemas.plan import Route
from schemas.slo import Slo

MODEL = Digest("1" * 64)
BLOB = Digest("2" * 64)
EDGE = TensorSpec(name="x", dtype="float32", shape=("batch", "sequence", 256))
A, B = NodeId("a"), NodeId("b")


@pytest.mark.parametrize(
    ("context", "sequences", "classes"),
    [
        (2048, 32, ((128, 32), (512, 8), (2048, 2))),
        (4096, 1, ((256, 1), (1024, 1), (4096, 1))),
        (300, 6, ((80, 6), (304, 2))),
        (100, 5, ((112, 5),)),
        (2, 3, ((16, 3),)),
    ],
)
def test_length_classes(context: int, sequences: int, classes: tuple[tuple[int, int], ...]) -> None:
    settings = Settings(context_tokens=context, max_sequences=sequences)
    assert length_classes(settings) == classes
    # In memory a class has at least two rows, so that a lone sequence can run in company.
    assert kv_tokens(settings) == sum(tokens * max(2, slots) for tokens, slots in classes)


@given(st.integers(2, 200_000), st.integers(1, 1024))
def test_every_admitted_length_has_a_slot(context: int, sequences: int) -> None:
    classes = length_classes(Settings(context_tokens=context, max_sequences=sequences))
    lengths = [tokens for tokens, _ in classes]
    assert lengths == sorted(set(lengths))
    assert lengths[-1] >= context
    assert all(tokens % ALIGNMENT_TOKENS == 0 and slots >= 1 for tokens, slots in classes)
    assert classes[0][1] == sequences


def decoder() -> Manifest:
    cache = KvCache(
        layout="shared",
        heads=2,
        head_dim=16,
        dtype="float16",
        past_key="pk",
        past_value="pv",
        present_key="nk",
        present_value="nv",
    )

    def block(index: int, weight: int, flops: int, kv: tuple[KvCache, ...]) -> Block:
        return Block(
            index=index,
            role=("embedding", "layer", "head")[index],
            graph=BlobRef(digest=BLOB, size_bytes=0),
            weights=(BlobRef(digest=BLOB, size_bytes=weight),),
            input=EDGE if index else None,
            output=EDGE if index < 2 else None,
            kv=kv,
            flops_per_token=flops,
        )

    return Manifest(
        name="tiny",
        kind=ModelKind.DECODER,
        architecture="llama",
        precision="fp32",
        source="test",
        cut="by hand",
        inputs=(),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", "sequence", 1000)),),
        blocks=(block(0, 10**7, 0, ()), block(1, 10**7, 5 * 10**6, (cache,)), block(2, 2 * 10**7, 10**7, ())),
        whole=BlobRef(digest=BLOB, size_bytes=0),
        text=TextSpec(tokenizer=BlobRef(digest=BLOB, size_bytes=0), vocab_size=1000, context_length=4096),
    )


def capacity(node: str, **fields: object) -> Capacity:
    base: dict[str, object] = {
        "node": node,
        "boot": "b",
        "sequence": 0,
        "issued_at": datetime(2026, 1, 1, tzinfo=UTC),
        "version": "0",
        "provider": Provider(name="cpu", device="d", flops_per_s=1e11, bytes_per_s=1e10),
        "threads": 1,
        "memory_total_bytes": 1 << 30,
        "memory_free_bytes": 1 << 30,
        "disk_free_bytes": 0,
        "load": 0,
    }
    return Capacity.model_validate({**base, **fields})


def predicted(
    route: Route, nodes: Mapping[NodeId, Capacity], model: Manifest, *prompt_tokens: int, **asked: Any
) -> cost.Estimate:
    return cost.predict(route, hosts_of(nodes, model, MODEL), model, *prompt_tokens, **asked)


def test_a_block_that_was_measured_is_not_guessed() -> None:
    measured = BlockTime(model=MODEL, block=1, decode_ms=7, prefill_ms_per_token=3)
    nodes = {A: capacity("a", block_times=(measured,)), B: capacity("b")}
    seen = hosts_of(nodes, decoder(), MODEL)
    assert (seen[A].times.ms[compute.DECODE, 1], seen[A].times.ms[compute.TOKEN, 1]) == (7, 3)
    assert (seen[A].measured, seen[B].measured) == (frozenset({1}), frozenset[int]())
    # Decoding streams 10 MB at 10 GB/s: 1 ms. Prefill is bound by 5 MFLOP at 100 GFLOP/s: 0.05 ms a token.
    guessed = seen[B].times.ms[:, 1]
    assert guessed[compute.DECODE] == pytest.approx(1 + compute.OVERHEAD_MS)
    assert guessed[compute.TOKEN] == pytest.approx(0.05 + compute.OVERHEAD_MS / 128)
    assert seen[A].times.ms[:, 2] == pytest.approx(seen[B].times.ms[:, 2])


def test_an_embedding_reads_a_row_not_its_table() -> None:
    [node] = hosts_of({A: capacity("a")}, decoder(), MODEL).values()
    assert node.times.decode_ms[0] == pytest.approx(compute.OVERHEAD_MS)


def test_an_estimate_is_the_sum_of_its_terms() -> None:
    links = (LinkEstimate(peer=NodeId("b"), rtt_ms=10, direct=True),)
    nodes = {NodeId("a"): capacity("a", links=links), NodeId("b"): capacity("b")}
    stages = (Stage(node=NodeId("a"), first=0, last=1), Stage(node=NodeId("b"), first=2, last=2))
    route = Route(index=0, source=NodeId("a"), stages=stages, max_sequences=1)
    found = predicted(route, nodes, decoder(), 100)
    assert [(h.source, h.target) for h in found.hops] == [("a", "b"), ("b", "a")]
    assert found.hops[0].decode_ms == pytest.approx(5 + 1e3 * 1024 / network.DEFAULT_LINK_BYTES_PER_S)
    assert found.hops[0].prefill_ms == pytest.approx(5 + 1e5 * 1024 / network.DEFAULT_LINK_BYTES_PER_S)
    assert found.hops[1].decode_ms == pytest.approx(5, rel=1e-3)
    assert found.stages[0].decode_ms == pytest.approx(1 + 2 * compute.OVERHEAD_MS)
    assert found.stages[1].decode_ms == pytest.approx(2 + compute.OVERHEAD_MS)
    assert found.bottleneck_ms == found.stages[1].decode_ms
    assert found.tpot_ms == pytest.approx(3 + 3 * compute.OVERHEAD_MS + 10, rel=1e-2)
    assert found.terms["compute_ms"] + found.terms["network_ms"] == pytest.approx(found.terms["tpot_ms"], abs=2e-3)
    assert not found.stages[0].measured


def test_memory_counts_weights_and_every_slot_of_the_cache() -> None:
    block = decoder().blocks[1]
    settings = Settings(context_tokens=2048, max_sequences=32)
    assert memory.kv_memory_bytes(block, settings) == 2 * 2 * 16 * 2 * (128 * 32 + 512 * 8 + 2048 * 2)
    assert memory.memory_bytes(block, settings) == memory.weight_memory_bytes(block) + memory.kv_memory_bytes(
        block, settings
    )
    assert memory.weight_memory_bytes(block) > 10**7


def two_stages(*links: LinkEstimate) -> tuple[Route, dict[NodeId, Capacity]]:
    stages = (Stage(node=A, first=0, last=1), Stage(node=B, first=2, last=2))
    times = [
        (BlockTime(model=MODEL, block=b, decode_ms=10, prefill_ms_per_token=1), n) for b, n in ((0, A), (1, A), (2, B))
    ]
    nodes = {
        node: capacity(node, links=links if node == A else (), block_times=tuple(t for t, n in times if n == node))
        for node in (A, B)
    }
    return Route(index=0, source=A, stages=stages, max_sequences=1), nodes


def test_a_link_that_was_measured_is_not_guessed() -> None:
    slow = LinkEstimate(peer=B, rtt_ms=0, direct=True, goodput_bytes_per_s=1e6)
    _, nodes = two_stages(slow)
    assert network.hop_ms(network.links_of(nodes), A, B, 1000) == pytest.approx(1.0)
    assert network.hop_ms(network.links_of(nodes), B, A, 1000) == pytest.approx(1.0)  # nobody measured the way back
    assert network.hop_ms(network.links_of(two_stages()[1]), A, B, 1000) == pytest.approx(
        0.25 + 1e6 / network.DEFAULT_LINK_BYTES_PER_S
    )


def test_an_edge_whose_link_is_down_is_for_want_of_another() -> None:
    bus = LinkEstimate(peer=B, rtt_ms=4, direct=False)
    _, over_the_bus = two_stages(bus)
    route, faulty = two_stages(bus.model_copy(update={"up": False}))
    for way in ((A, B), (B, A)):  # one of the two says so: that is enough
        assert (
            network.hop_ms(network.links_of(faulty), *way, 0)
            == network.hop_ms(network.links_of(over_the_bus), *way, 0) + network.EDGE_FAULT_MS
        )
        assert network.edge_ms(network.links_of(faulty), *way)[0] == network.EDGE_FAULT_MS + 4 / 2
    slower = predicted(route, faulty, decoder()).tpot_ms - predicted(route, over_the_bus, decoder()).tpot_ms
    assert slower == pytest.approx(2 * network.EDGE_FAULT_MS)


def test_throughput_is_bound_by_the_busiest_node_or_link() -> None:
    route, nodes = two_stages()
    found = predicted(route, nodes, decoder())
    assert [node.busy_ms for node in found.nodes] == [20, 10]
    assert found.bottleneck_ms == 20
    # 1 KiB a step over 10 kB/s keeps the link busy for 102 ms; its latency keeps nothing busy.
    route, nodes = two_stages(LinkEstimate(peer=B, rtt_ms=500, direct=True, goodput_bytes_per_s=1e4))
    assert predicted(route, nodes, decoder()).bottleneck_ms == pytest.approx(102.4)


def test_load_is_what_arrives_times_what_it_takes_and_makes_steps_wait() -> None:
    route, nodes = two_stages()
    demand = Demand(requests_per_s=0.5, output_tokens=100, batch=2)
    found = predicted(route, nodes, decoder(), 10, demand=demand)
    # Half a request a second: 10 tokens of prompt at 2 ms and 100 steps of 20 ms, two sequences sharing each.
    assert found.nodes[0].rho == pytest.approx(0.5 * (20 + 100 * 20 / 2) / 1e3)
    # The other prompts take 0.5 * 30 ms of every second, in each of which there is one step instead of several.
    alone = predicted(route, nodes, decoder(), 10, demand=Demand(output_tokens=100, batch=2))
    assert found.tpot_ms >= alone.tpot_ms
    assert found.ttft_ms > alone.ttft_ms
    assert found.tpot_ms - alone.tpot_ms == pytest.approx(sum(node.wait_ms for node in found.nodes))
    assert [node.rho for node in alone.nodes] == [0, 0]
    assert found.imbalance == pytest.approx((0.51 - 0.255) / 2)
    assert alone.imbalance == 0


def test_requests_miss_a_target_by_what_they_wait_or_by_what_they_take_anyway() -> None:
    route, nodes = two_stages()
    alone = predicted(route, nodes, decoder(), 10)
    for slo in (Slo(ttft_ms=alone.ttft_ms), Slo(tpot_ms=alone.tpot_ms), Slo(deadline_ms=alone.e2e_ms)):
        assert alone.missing(slo) == pytest.approx(0.5)
        assert alone.of_promised(slo) == pytest.approx(1.0)
    # An error of a tenth is a step of a tenth: at 20 % more or less it is over.
    shares = [alone.missing(Slo(ttft_ms=share * alone.ttft_ms)) for share in (0.8, 0.9, 1.1, 1.2)]
    assert shares == pytest.approx([0.98, 0.85, 0.17, 0.05], abs=0.01)
    assert (alone.missing(Slo()), alone.of_promised(Slo())) == (0.0, 0.0)
    busy = predicted(route, nodes, decoder(), 10, demand=Demand(requests_per_s=5.0, output_tokens=100))
    wait_ms = sum(stage.prefill_wait_ms for stage in busy.stages)
    takes_ms = busy.ttft_ms - wait_ms
    # M/M/1: w = rho/(1-rho) * s, and of those that wait at all each e-fold is as long as the one before.
    rho = wait_ms / (wait_ms + takes_ms)
    far = takes_ms + 20 * wait_ms / rho
    assert busy.missing(Slo(ttft_ms=far)) == pytest.approx(rho * math.exp(-20), abs=1e-6)
    near = takes_ms + wait_ms / rho
    anyway = alone.missing(Slo(ttft_ms=near * alone.ttft_ms / takes_ms))
    assert busy.missing(Slo(ttft_ms=near)) == pytest.approx(anyway + (1 - anyway) * rho / math.e)


def test_requests_go_where_they_end_first_until_that_is_as_late_as_elsewhere() -> None:
    def on(node: NodeId) -> tuple[Stage, ...]:
        return (Stage(node=node, first=0, last=2),)

    def took(ms: float) -> tuple[BlockTime, ...]:
        return tuple(BlockTime(model=MODEL, block=b, decode_ms=ms, prefill_ms_per_token=ms / 10) for b in range(3))

    nodes = hosts_of({A: capacity("a", block_times=took(5)), B: capacity("b", block_times=took(15))}, decoder(), MODEL)
    idle, busy, full = (
        forecast((on(A), on(B)), nodes, decoder(), 10, demand=Demand(rate, 32)) for rate in (0.0, 10.0, 100.0)
    )
    assert idle.speeds == busy.speeds == pytest.approx((0.75, 0.25))
    assert idle.shares[0] > 0.95
    assert idle.shares[0] > busy.shares[0] > full.shares[0] > 0.5
    assert [sum(one.shares) for one in (idle, busy, full)] == pytest.approx([1, 1, 1])
    alone = forecast((on(A),), nodes, decoder(), 10, demand=Demand(100.0, 32))
    assert full.ttft_ms < alone.ttft_ms, "a slow route is better than to wait"
    assert idle.e2e_ms < 1.1 * forecast((on(A),), nodes, decoder(), 10).e2e_ms, "and keeps nobody while none waits"


def test_an_overloaded_node_waits_long_but_not_forever_and_is_charged_for_it() -> None:
    assert queue_wait_ms(1.5, 10) == queue_wait_ms(0.95, 10) == pytest.approx(190)
    assert imbalance([1.2], Weights()) == pytest.approx(5 * 0.5)


def test_memory_and_energy_are_known_where_they_are_given() -> None:
    route, nodes = two_stages()
    plain = predicted(route, nodes, decoder())
    assert [(node.memory_bytes, node.energy_mj) for node in plain.nodes] == [(None, None)] * 2
    assert plain.energy_mj is None
    settings = Settings()
    found = predicted(route, nodes, decoder(), settings=settings, power_w={A: 30, B: 15})
    assert found.nodes[0].memory_bytes == sum(memory.memory_bytes(block, settings) for block in decoder().blocks[:2])
    assert found.energy_mj == pytest.approx(30 * 20 + 15 * 10)
    assert predicted(route, nodes, decoder(), power_w={A: 30}).energy_mj is None
    # Where nobody says otherwise, it is what the nodes say that they draw.
    drawing = {node: capacity.model_copy(update={"power_w": 20}) for node, capacity in nodes.items()}
    assert predicted(route, drawing, decoder()).energy_mj == pytest.approx(20 * 20 + 20 * 10)


def test_phi_is_the_weighed_sum_of_latency_balance_and_privacy() -> None:
    route, nodes = two_stages()
    found = predicted(route, nodes, decoder(), 10, demand=Demand(0.5, 100, 2), trusted=frozenset({A}))
    weights = Weights(alpha=2, beta=3, gamma=4)
    phi = found.objective(found.latency_ms / 1.5, weights)
    assert phi.latency == pytest.approx(2 * 1.5)
    assert phi.balance == pytest.approx(3 * found.imbalance)
    # The head is on an untrusted node, and the boundary before it crosses over from the trusted one.
    assert phi.privacy == pytest.approx(4 * (1 + 0.5))
    assert phi.phi == phi.latency + phi.balance + phi.privacy
    assert phi.terms["phi"] == pytest.approx(phi.phi, abs=1e-3)
    assert predicted(route, nodes, decoder()).exposure == 0  # without tiers everybody is trusted


def test_the_prompt_counts_for_as_much_of_a_request_as_it_takes() -> None:
    route, nodes = two_stages()
    found = predicted(route, nodes, decoder(), 100, demand=Demand(output_tokens=11))
    assert found.e2e_ms == pytest.approx(found.ttft_ms + 10 * found.tpot_ms)
    assert found.latency_ms == pytest.approx(found.e2e_ms / 11)
    tensor = decoder().model_copy(update={"kind": ModelKind.TENSOR})
    assert predicted(route, nodes, tensor).latency_ms == predicted(route, nodes, tensor).tpot_ms


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0])
def test_weights_demands_and_references_that_are_none_are_refused(wrong: float) -> None:
    route, nodes = two_stages()
    estimate = predicted(route, nodes, decoder())
    with pytest.raises(ResplitError) as refused:
        Weights(beta=wrong)
    assert (refused.value.code, refused.value.field) == (ErrorCode.INVALID_REQUEST, "beta")
    with pytest.raises(ResplitError, match="requests_per_s"):
        Demand(requests_per_s=wrong)
    with pytest.raises(ResplitError, match="reference latency"):
        estimate.objective(wrong, Weights())
    with pytest.raises(ResplitError, match="at least 1"):
        Demand(batch=0.5)


def timed(**terms: float | None) -> tuple[Route, dict[NodeId, Capacity]]:
    """Two stages whose blocks take 10 ms a step and 1 ms a token of a prompt, and `terms` besides."""
    route, nodes = two_stages()
    return route, {
        name: one.model_copy(update={"block_times": tuple(t.model_copy(update=terms) for t in one.block_times)})
        for name, one in nodes.items()
    }


def sharing(nodes: dict[NodeId, Capacity], *cores: tuple[int, ...]) -> dict[NodeId, Capacity]:
    """The nodes on one machine, each on the cores given."""
    return {
        name: one.model_copy(update={"machine": "m", "cores": on, "threads": len(on)})
        for (name, one), on in zip(nodes.items(), cores, strict=True)
    }


def test_each_sequence_beyond_the_company_of_a_lone_one_adds_to_a_step() -> None:
    route, nodes = timed(decode_ms_per_row=2.0, rows_min=2)

    def compute_ms(batch: float) -> float:
        found = predicted(route, nodes, decoder(), demand=Demand(batch=batch))
        return sum(stage.decode_ms for stage in found.stages)

    assert [compute_ms(batch) for batch in (1, 2, 3, 8)] == pytest.approx([30, 30, 36, 66])


def test_each_token_behind_a_sequence_adds_to_its_steps() -> None:
    route, nodes = timed(decode_ms_per_context_token=0.01)
    short, long, kept = (
        predicted(route, nodes, decoder(), tokens, cached_tokens=cached, demand=Demand(output_tokens=2))
        for tokens, cached in ((100, 0), (600, 0), (100, 500))
    )
    assert long.tpot_ms - short.tpot_ms == pytest.approx(3 * 500 * 0.01)
    assert kept.tpot_ms == pytest.approx(long.tpot_ms)
    assert kept.ttft_ms == pytest.approx(short.ttft_ms)  # what was kept is not computed again


def test_a_chunk_has_its_price_and_the_head_runs_for_the_last_one_alone() -> None:
    route, nodes = timed(prefill_ms=5.0)
    found = predicted(route, nodes, decoder(), 300, settings=Settings(chunk_tokens=128))
    # Three chunks of the embedding and the layer; the head sees the last 44 tokens.
    assert [stage.prefill_ms for stage in found.stages] == pytest.approx([2 * (3 * 5 + 300), 5 + 44])
    assert [stage.chunks for stage in found.stages] == [3, 3]


def test_a_frame_costs_every_stage_what_the_node_says() -> None:
    route, nodes = timed()
    handled = {name: one.model_copy(update={"frame_ms": 0.5}) for name, one in nodes.items()}
    plain, found = (predicted(route, seen, decoder(), 300) for seen in (nodes, handled))
    assert found.tpot_ms - plain.tpot_ms == pytest.approx(2 * 0.5)
    assert found.ttft_ms - plain.ttft_ms == pytest.approx(2 * 3 * 0.5)
    assert found.terms["frame_ms"] == 1.0


def test_a_prompt_waits_for_the_steps_of_others_only_where_they_share_processors() -> None:
    route, nodes = timed()
    beside = Demand(batch=2)

    def wait_ms(capacities: dict[NodeId, Capacity], demand: Demand = beside) -> float:
        found = predicted(route, capacities, decoder(), 256, demand=demand)
        return sum(stage.prefill_wait_ms for stage in found.stages)

    assert wait_ms(nodes) == 0  # nobody says that they do
    assert wait_ms(sharing(nodes, (0,), (1,))) == 0
    # Of 30 ms, one before the second of two chunks, and half of one before the first.
    assert wait_ms(sharing(nodes, (0, 1), (0, 1))) == pytest.approx(1.5 * 30)
    assert wait_ms(sharing(nodes, (0, 1), (0, 1)), Demand(batch=1)) == 0


def test_prompts_ahead_are_waited_for() -> None:
    route, nodes = timed()
    alone, behind = (predicted(route, nodes, decoder(), 128, demand=Demand(ahead_tokens=ahead)) for ahead in (0, 256))
    assert behind.ttft_ms == pytest.approx(3 * alone.ttft_ms)


def test_chunks_and_steps_overlap_as_far_as_they_may_be_in_flight_and_processors_allow() -> None:
    route, nodes = timed(decode_ms_per_row=0.0)
    deep = Settings(pipeline_depth=2)
    alone, two = (
        predicted(route, nodes, decoder(), 512, demand=Demand(batch=4), settings=settings)
        for settings in (Settings(), deep)
    )
    # Four chunks of 128: 256 ms in the first stage and at most 128 in the second; it is busy all the time.
    assert alone.overlap_ms == 0
    assert two.ttft_ms < alone.ttft_ms
    assert two.ttft_ms >= 4 * 256
    one_machine = sharing(nodes, (0,), (0,))
    shared = predicted(route, one_machine, decoder(), 512, demand=Demand(batch=4), settings=deep)
    assert shared.overlap_ms == pytest.approx(0, abs=5)  # only links overlap with computing
    # Two groups take turns on the processors that they share: a step is there for each of them.
    assert shared.tpot_ms == pytest.approx(2 * 30)


@given(
    st.floats(0, 5),
    st.floats(0, 10 / REFERENCE_CONTEXT_TOKENS),
    st.integers(1, 2000),
    st.integers(0, 4),
    st.floats(1, 32),
    st.floats(0, 16),
    st.floats(0, 2),
    st.booleans(),
)
def test_more_load_and_longer_prompts_never_look_faster(
    per_row: float,
    per_context: float,
    prompt: int,
    longer: int,
    batch: float,
    more: float,
    arrivals: float,
    shared: bool,
) -> None:
    # What a further sequence adds was measured behind the reference context, and holds that context's part.
    per_row += REFERENCE_CONTEXT_TOKENS * per_context
    route, nodes = timed(decode_ms_per_row=per_row, decode_ms_per_context_token=per_context)
    seen = sharing(nodes, (0,), (0,)) if shared else nodes

    def found(tokens: int, demand: Demand) -> cost.Estimate:
        return predicted(route, seen, decoder(), tokens, demand=demand)

    base = found(prompt, Demand(batch=batch))
    for heavier in (
        found(prompt, Demand(batch=batch + more)),
        found(prompt, Demand(arrivals, batch=batch)),
        # By whole chunks: of a prompt just beyond one, the head sees a token, and of a shorter one all of them.
        found(prompt + longer * DEFAULT_CHUNK_TOKENS, Demand(batch=batch)),
        found(prompt, Demand(batch=batch, ahead_tokens=longer)),
    ):
        assert heavier.tpot_ms >= base.tpot_ms * (1 - 1e-9)
        assert heavier.ttft_ms >= base.ttft_ms * (1 - 1e-9)
    total = sum(s.decode_ms + s.wait_ms + s.frame_ms for s in base.stages) + sum(hop.decode_ms for hop in base.hops)
    assert base.tpot_ms == pytest.approx(total)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize(
    "term", ["decode_ms", "prefill_ms_per_token", "prefill_ms", "decode_ms_per_row", "decode_ms_per_context_token"]
)
def test_a_profile_that_is_no_time_is_refused(term: str, wrong: float) -> None:
    times = {"model": MODEL, "block": 0, "decode_ms": 1.0, "prefill_ms_per_token": 1.0}
    with pytest.raises(ValidationError, match=term):
        BlockTime.model_validate({**times, term: wrong})
