"""A cluster serves a sealed model: answers as in the open, no plaintext on any disk, keys only where blocks are."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from nats.aio.msg import Msg

from agent.keys import BlockKeys
from bus.identity import ORCHESTRATOR, load_identity
from models.keyring import read_keys
from models.opening import opened
from models.reference import Reference
from models.sealer import seal_model
from models.store import Store
from models.text import Text
from resplit import Client, RequestError
from resplit.control import deploy, deploy_and_wait, place_and_wait, status
from resplit.demo import shipped_store
from resplit.exits import Exit
from schemas import subjects
from schemas.audit import AuditKind
from schemas.base import DeploymentName, NodeId
from schemas.control import DeployRequest
from schemas.deployment import Settings, Stage
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Manifest
from schemas.plan import PlanEvent
from schemas.section import nothing_of, section_of
from tests.integration.cluster_fixtures import N0, N1, N2, Oracle, Serving, command, serving
from tests.model_split import corrupt
from tests.plaintext import exposed_in, traces
from tests.sealed_events import whole

pytestmark = pytest.mark.asyncio(loop_scope="session")

ADDER = DeploymentName("adder")
PROMPT, TOKENS = "348+1275=", 8
STEP_S = 60.0
HOME = (
    Stage(node=N0, first=0, last=3),
    Stage(node=N1, first=4, last=6),
    Stage(node=N2, first=7, last=9),
)


@pytest.fixture(scope="module")
def plain() -> Store:
    return Store(shipped_store())


@pytest.fixture(scope="module")
def registry(plain: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """What the orchestrator serves: the adder, sealed."""
    store = Store(tmp_path_factory.mktemp("registry"))
    seal_model(plain, ADDER, store)
    return store


@pytest.fixture(scope="module")
def expected(plain: Store) -> list[int]:
    """The answer of the uncut model in the open."""
    reference = Reference(plain, ADDER)
    spec = reference.manifest.text
    assert spec is not None
    prompt = Text(spec, plain.path(spec.tokenizer.digest)).encode(PROMPT)
    return reference.generate(list(prompt), TOKENS, context_tokens=64)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def sealed(tmp_path_factory: pytest.TempPathFactory, registry: Store, oracle: Oracle) -> AsyncIterator[Serving]:
    async with serving(tmp_path_factory.mktemp("sealed") / "cluster", registry, oracle) as running:
        request = DeployRequest(name=ADDER, model=ADDER, placement=HOME, settings=Settings(context_tokens=64))
        await deploy_and_wait(running.cluster.operator, request, STEP_S)
        yield running
        running.alive()


async def placed(running: Serving, *stages: Stage) -> None:
    await place_and_wait(running.cluster.operator, ADDER, stages, STEP_S)


async def until_answering(running: Serving, expected: list[int]) -> None:
    """Wait until the deployment answers, and rightly; what it says meanwhile are typed errors."""
    async with asyncio.timeout(STEP_S):
        while True:
            try:
                async with Client(running.cluster.url, keys=running.cluster.client_keys, idle_timeout_s=2.0) as client:
                    answer = await client.complete(ADDER, PROMPT, max_tokens=TOKENS)
            except RequestError as error:
                assert error.code != "internal"
                await asyncio.sleep(0.1)
                continue
            assert list(answer.token_ids) == expected[: len(answer.token_ids)]
            return


async def newest(running: Serving) -> PlanEvent:
    message = await running.control.jetstream().get_last_msg(subjects.STREAM_PLANS, subjects.plan(ADDER))
    return whole(message.data, load_identity(running.cluster.keys / ORCHESTRATOR, ORCHESTRATOR))


def store_of(running: Serving, node: NodeId) -> Store:
    return Store(running.cluster.folder / node / "store")


def opens(running: Serving, node: NodeId, event: PlanEvent, manifest: Manifest, block: int) -> bool:
    """Whether whoever has `node`'s folder and the log of plans can open a block's sealed files, wherever they lie."""
    keys = BlockKeys(load_identity(running.cluster.keys / node, node))
    keys.follow(section_of(event, node) or nothing_of(event))
    registry = Store(running.cluster.store)
    try:
        with opened(registry, manifest, [manifest.blocks[block]], lambda i: keys.key(manifest.digest, i)):
            return True
    except ResplitError as error:
        assert error.code is ErrorCode.MISSING_KEYS
        return False


async def test_a_sealed_model_answers_as_the_model_in_the_open(sealed: Serving, expected: list[int]) -> None:
    answer = await sealed.client.complete(ADDER, PROMPT, max_tokens=TOKENS)
    assert list(answer.token_ids) == expected


async def test_no_file_of_the_registry_or_of_any_process_holds_plaintext(sealed: Serving, plain: Store) -> None:
    manifest = plain.manifest(ADDER)
    wanted = traces(plain, manifest.blocks)
    assert len(exposed_in(plain.root, wanted)) >= len(set(wanted.values())), "what is looked for can be found"
    assert exposed_in(sealed.cluster.store, wanted) == set()
    assert exposed_in(sealed.cluster.folder, wanted) == set()
    names = {path.name for folder in (sealed.cluster.store, sealed.cluster.folder) for path in folder.rglob("*")}
    assert not names & {ref.digest for block in manifest.blocks for ref in block.files}


async def test_a_node_can_open_the_blocks_that_it_hosts_and_no_others(sealed: Serving, registry: Store) -> None:
    event, manifest = await newest(sealed), registry.manifest(ADDER)
    for stage in HOME:
        found = [opens(sealed, stage.node, event, manifest, block.index) for block in manifest.blocks]
        assert [i for i, can in enumerate(found) if can] == list(stage.blocks)
    # Nor does it help to go by another's wraps: they are made for the other's key.
    assert event.keys is not None
    theirs = [keys.model_copy(update={"node": N0}) for keys in event.keys if keys.node == N1]
    thief = BlockKeys(load_identity(sealed.cluster.keys / N0, N0))
    mine = section_of(event.model_copy(update={"keys": tuple(theirs)}), N0)
    assert mine is not None
    thief.follow(mine)
    with pytest.raises(ResplitError) as caught:
        thief.key(manifest.digest, HOME[1].first)
    assert caught.value.code is ErrorCode.BAD_SIGNATURE


async def test_a_new_split_moves_sealed_blocks_between_nodes_without_the_registry(
    sealed: Serving, registry: Store, plain: Store, expected: list[int]
) -> None:
    manifest = registry.manifest(ADDER)
    moved = manifest.blocks[4]
    hidden = [registry.path(ref.digest) for ref in moved.stored]
    for path in hidden:
        path.rename(path.with_name(f"hidden-{path.name}"))
    try:
        await placed(sealed, Stage(node=N0, first=0, last=4), Stage(node=N1, first=5, last=6), HOME[2])
    finally:
        for path in hidden:
            path.with_name(f"hidden-{path.name}").rename(path)
    assert all(store_of(sealed, N0).has(ref.digest) for ref in moved.stored)
    answer = await sealed.client.complete(ADDER, PROMPT, max_tokens=TOKENS)
    assert list(answer.token_ids) == expected
    event = await newest(sealed)
    assert [opens(sealed, node, event, manifest, 4) for node in (N0, N1)] == [True, False]
    assert exposed_in(sealed.cluster.folder, traces(plain, plain.manifest(ADDER).blocks)) == set()


async def test_a_sealed_file_that_is_damaged_is_audited_and_fetched_anew(
    sealed: Serving, registry: Store, expected: list[int]
) -> None:
    ref = registry.manifest(ADDER).blocks[8].stored[-1]
    theirs = store_of(sealed, N2).path(ref.digest)
    await sealed.cluster.kill(N2)
    corrupt(theirs)
    sealed.ear.heard.clear()
    await sealed.cluster.start(N2)
    event = await sealed.ear.wait(AuditKind.BLOB_CORRUPT, source=N2, timeout_s=STEP_S)
    assert event.fields["digest"] == ref.digest
    await until_answering(sealed, expected)
    await placed(sealed, *HOME)
    assert theirs.read_bytes() == registry.path(ref.digest).read_bytes()
    await until_answering(sealed, expected)


async def test_an_agent_that_restarts_finds_its_keys_in_the_log(
    sealed: Serving, plain: Store, expected: list[int]
) -> None:
    await sealed.cluster.kill(N1)
    await sealed.cluster.start(N1)
    await until_answering(sealed, expected)
    assert exposed_in(sealed.cluster.folder, traces(plain, plain.manifest(ADDER).blocks)) == set()


async def test_a_model_whose_keys_are_elsewhere_is_refused_before_anything_changes(
    sealed: Serving, registry: Store, expected: list[int]
) -> None:
    digest = registry.resolve(ADDER)
    keys = registry.keys_folder / digest
    aside = keys.with_name("aside")
    keys.rename(aside)
    try:
        with pytest.raises(ResplitError, match="bring") as caught:
            await deploy(sealed.cluster.operator, DeployRequest(name=DeploymentName("other"), model=ADDER))
        assert caught.value.code is ErrorCode.MISSING_KEYS
        code, _, said = await command(
            "deploy", ADDER, "--name", "other", "--url", sealed.cluster.url, "--keys", str(sealed.cluster.operator_keys)
        )
        assert (code, "missing_keys" in said) == (Exit.NOT_FOUND, True)
    finally:
        aside.rename(keys)
    assert [found.name for found in (await status(sealed.cluster.operator)).deployments] == [ADDER]
    await until_answering(sealed, expected)


async def test_what_is_on_the_bus_holds_neither_weights_nor_keys(
    sealed: Serving, registry: Store, plain: Store, expected: list[int]
) -> None:
    heard: list[bytes] = []

    async def note(message: Msg) -> None:
        heard.append(message.data)

    subscriptions = [await owner.subscribe(">", cb=note) for owner in (sealed.control, sealed.edge)]
    head = registry.manifest(ADDER).blocks[9].stored
    for ref in head:
        store_of(sealed, N1).path(ref.digest).unlink(missing_ok=True)
    await placed(sealed, HOME[0], Stage(node=N1, first=4, last=9))
    for subscription in subscriptions:
        await subscription.unsubscribe()
    said = b"".join(heard)
    sealed_bytes = registry.path(head[-1].digest).read_bytes()
    assert sealed_bytes[1000:1100] in said, "files do travel here"
    assert not [trace for trace in traces(plain, plain.manifest(ADDER).blocks) if trace in said]
    keys = read_keys(registry, registry.resolve(ADDER))
    for block in range(len(keys.keys)):
        assert keys.key(block) not in said
        assert keys.keys[block].encode() not in said
    await until_answering(sealed, expected)
