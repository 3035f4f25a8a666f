"""Blocks that several deployments share are counted once: as they are planned, promised, and given back."""

from orchestrator.cold import without
from orchestrator.fold import DeploymentWritten, ManifestKnown, Snapshot
from orchestrator.rooms import rooms, taken_bytes, unpromised_bytes
from orchestrator.trial import trial
from schemas.base import Digest
from schemas.deployment import Deployment
from schemas.manifest import BlobRef, Manifest
from tests.unit.test_orchestrator_cold import ONE, THREE, TWO, Cluster, Node
from tests.unit.test_orchestrator_planning import BLOCK, A, manifest, wish

OWN = 10**6
VARIANT, OTHER = Digest("7" * 64), Digest("8" * 64)


def variant(number: int) -> Manifest:
    """The toy model with an adapter of `OWN` bytes over each block."""
    toy = manifest()
    blocks = tuple(
        block.model_copy(update={"adapter": BlobRef(digest=Digest(f"{number:032x}{block.index:032x}"), size_bytes=OWN)})
        for block in toy.blocks
    )
    return toy.model_copy(update={"blocks": blocks})


def cluster_with_a_base(room: float = 4.9) -> Cluster:
    """One node with room for a base and some adapters; the base serves."""
    cluster = Cluster(Node(A, room))
    toy = wish(name=ONE, on_demand=True)
    cluster.mind.fold(DeploymentWritten(toy), cluster.now)
    cluster.run(3)
    assert cluster.states() == {ONE: "serving"}
    for number, digest in ((1, VARIANT), (2, OTHER)):
        cluster.mind.fold(ManifestKnown(digest, variant(number)), cluster.now)
    return cluster


def needs(snapshot: Snapshot, deployment: Deployment, model: Manifest) -> tuple[int, ...]:
    return rooms(snapshot, deployment, model)[A].need_bytes


def test_beside_its_base_a_variant_takes_its_adapters_and_no_more() -> None:
    cluster = cluster_with_a_base()
    found = wish(name=TWO, model=VARIANT)
    assert needs(cluster.mind.snapshot, found, variant(1)) == (OWN,) * 4
    alone = Cluster(Node(A, 4.6)).mind.snapshot
    assert needs(alone, found, variant(1)) == (BLOCK + OWN,) * 4
    plan = trial(cluster.mind.snapshot, found, variant(1), cluster.now).plan
    assert plan.blocks_on(A) == (0, 1, 2, 3)


def test_what_two_of_them_are_promised_is_the_base_once() -> None:
    cluster = cluster_with_a_base()
    before = unpromised_bytes(cluster.mind.snapshot)[A]
    cluster.nodes[A].loads = False
    for name, model in ((TWO, VARIANT), (THREE, OTHER)):
        cluster.mind.fold(DeploymentWritten(wish(name=name, model=model, on_demand=True)), cluster.now)
    cluster.run(2)
    assert cluster.states() == {ONE: "serving", TWO: "preparing", THREE: "preparing"}
    assert unpromised_bytes(cluster.mind.snapshot)[A] == before - 8 * OWN


def test_a_base_that_goes_cold_frees_nothing_that_its_variant_uses() -> None:
    cluster = cluster_with_a_base()
    cluster.mind.fold(DeploymentWritten(wish(name=TWO, model=VARIANT, on_demand=True)), cluster.now)
    cluster.run(3)
    assert cluster.states() == {ONE: "serving", TWO: "serving"}
    snapshot = cluster.mind.snapshot
    assert taken_bytes(snapshot, (ONE, TWO)) == {A: 4 * (BLOCK + OWN)}
    assert taken_bytes(snapshot, (ONE,)) == {A: 4 * BLOCK}

    def free(gone: set[str]) -> int:
        return without(snapshot, gone).nodes[A].capacity.memory_free_bytes  # type: ignore[arg-type]

    assert free({ONE}) == free(set())
    assert free({TWO}) == free(set()) + 4 * OWN
    assert free({ONE, TWO}) == free(set()) + 4 * (BLOCK + OWN)
