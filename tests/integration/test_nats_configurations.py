"""NATS servers as they are configured for operators: real ones on loopback, three that are one and a leaf node."""

import asyncio
import contextlib
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js import JetStreamContext

import models
from bus.cluster_folder import LEAF_SEED
from bus.connection import connect, settle
from bus.enrolment import revoke
from bus.examples import HOME, HOSTS, LEAF, examples
from bus.founding import JETSTREAM, found_cluster, load_holder
from bus.identity import ORCHESTRATOR, load_credentials
from bus.natsconf import LOGINS_FILE, SERVER_FILE
from bus.server_certificate import SERVER_CERTIFICATE, SERVER_KEY, certify
from bus.servers import Ports, make_leaf, make_servers
from bus.together import CLIENT, CLUSTER, OPERATOR, make_members
from resplit import control
from resplit.access import Access
from resplit.client import Client
from resplit.exchange import open_connection
from resplit.replies import RequestError
from schemas import subjects
from schemas.base import DeploymentName, NodeId
from schemas.control import DeployRequest
from schemas.deployment import Settings
from schemas.errors import ErrorCode, ResplitError
from tests.conftest import nats_server_binary

LOOPBACK = "127.0.0.1"
START_S, STOP_S = 30.0, 10.0
ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "deploy" / "nats"
N0 = NodeId("n0")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def checked(folder: Path) -> str:
    """What `nats-server -t` says of the configuration in `folder`; "" if it takes it."""
    command = [nats_server_binary(), "-t", "-c", SERVER_FILE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


def test_the_examples_are_those_that_the_code_writes() -> None:
    found = {str(path.relative_to(SHIPPED)): path.read_text() for path in SHIPPED.rglob("*.conf")}
    assert found == dict(examples()), "run `make nats-examples`"


def test_the_server_takes_every_example_with_the_files_that_go_with_it(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster"
    found_cluster(cluster, now=datetime.now(UTC), hosts=list(HOSTS.values()))
    key = load_holder(cluster / "root-0.key").authority
    make_servers(cluster, HOSTS, key, now=datetime.now(UTC))
    make_leaf(cluster, LEAF, "192.168.7.2", ["10.0.0.2"], key, now=datetime.now(UTC))
    make_leaf(cluster, HOME, "192.168.8.2", ["10.0.0.2"], key, now=datetime.now(UTC), store=JETSTREAM)
    for name, text in examples().items():
        kind, *which, _ = name.split("/")
        folder = tmp_path / "run" / name
        shutil.copytree(cluster if kind == "one" else cluster / "servers" / which[0], folder)
        (folder / SERVER_FILE).write_text(text)
        assert checked(folder) == "", name
        (folder / SERVER_FILE).write_text(text.replace("max_payload", "max_paylode"))
        assert "max_paylode" in checked(folder), name


@pytest.mark.parametrize(
    ("hosts", "field"),
    [({"a": "h", "b": "i"}, "server"), ({"A": "h"}, "server"), ({"a": "10.0.0.2:4222"}, "host"), ({}, "server")],
)
def test_servers_that_cannot_be_are_refused(tmp_path: Path, hosts: dict[str, str], field: str) -> None:
    found_cluster(tmp_path / "cluster", now=datetime.now(UTC))
    key = load_holder(tmp_path / "cluster" / "root-0.key").authority
    with pytest.raises(ResplitError) as refused:
        make_servers(tmp_path / "cluster", hosts, key, now=datetime.now(UTC))
    assert (refused.value.code, refused.value.field) == (ErrorCode.INVALID_REQUEST, field)


class Servers:
    """Three servers that are one, and a leaf node that hangs on two of them."""

    def __init__(self, members: Path) -> None:
        self.members = members
        self.cluster = members / CLUSTER
        self.key = load_holder(self.cluster / "root-0.key").authority
        self.ports = {name: Ports(LOOPBACK, free_port(), free_port(), free_port()) for name in ("a", "b", "c", "site")}
        now, hosts = datetime.now(UTC), dict.fromkeys("abc", LOOPBACK)
        there = make_servers(self.cluster, hosts, self.key, now=now, ports=self.ports, store=Path("jetstream"))
        hubs = [f"{LOOPBACK}:{self.ports[name].leaves}" for name in "ab"]
        leaf = make_leaf(self.cluster, "site", LOOPBACK, hubs, self.key, now=now, ports=self.ports["site"])
        self.folders = {folder.name: folder for folder in (*there, leaf)}
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def url(self, *names: str) -> str:
        return ",".join(f"nats://{LOOPBACK}:{self.ports[name].clients}" for name in names)

    def start(self, name: str) -> None:
        folder = self.folders[name]
        assert checked(folder) == ""
        with (folder / "log").open("ab") as log:
            command = [nats_server_binary(), "-c", SERVER_FILE]
            self.running[name] = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)

    def log(self, name: str) -> str:
        return (self.folders[name] / "log").read_text()

    async def until(self, true: Callable[[], bool]) -> None:
        try:
            async with asyncio.timeout(START_S):
                while not true():  # noqa: ASYNC110 - a log file sends no events
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError("\n".join(self.log(name)[-1500:] for name in self.folders)) from None

    def stop(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            process.wait(STOP_S)

    @asynccontextmanager
    async def member(self, name: str, *servers: str) -> AsyncIterator[Nats]:
        credentials = load_credentials(self.members / name)
        client = await asyncio.wait_for(connect(self.url(*servers), name, credentials=credentials), START_S)
        try:
            yield client
        finally:
            await client.close()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    members = tmp_path_factory.mktemp("several") / "keys"
    make_members(members, [N0, NodeId("n1")])
    found = Servers(members)
    try:
        for name in found.folders:
            found.start(name)
        yield found
    finally:
        found.stop()


async def kept_thrice(js: JetStreamContext) -> None:
    """Make a stream of Resplit's with three replicas, as soon as a leader can, and see that all three have it."""
    held: set[str | None] = set()
    async with asyncio.timeout(START_S):
        while held != {"a", "b", "c"}:
            with contextlib.suppress(NatsError, TimeoutError):
                made = await js.add_stream(name=subjects.STREAM_AUDIT, subjects=[subjects.ALL_AUDIT], num_replicas=3)
                assert made.cluster is not None and made.config.num_replicas == 3
                held = {made.cluster.leader, *(peer.name for peer in made.cluster.replicas or () if peer.current)}
            await asyncio.sleep(0.1)


async def test_three_servers_have_a_leader_and_keep_a_stream_thrice_while_one_is_lost(servers: Servers) -> None:
    await servers.until(lambda: any("Self is new JetStream cluster metadata leader" in servers.log(n) for n in "abc"))
    said = subjects.audit(ORCHESTRATOR, "test")
    async with servers.member(ORCHESTRATOR, "a") as steering:
        js = steering.jetstream()
        await kept_thrice(js)
        await js.publish(said, b"one")  # acknowledged: most of them have it
        servers.running["a"].kill()
        servers.running["a"].wait(STOP_S)
        try:
            # Who was connected there was told of the others, and finds what was kept where it is now.
            async with asyncio.timeout(START_S):
                while True:
                    with contextlib.suppress(NatsError, TimeoutError):
                        await js.publish(said, b"two")
                        break
                    await asyncio.sleep(0.2)
            state = (await js.stream_info(subjects.STREAM_AUDIT)).state
            assert state.first_seq == 1 and state.messages >= 2
        finally:
            servers.start("a")
        await kept_thrice(js)  # it catches up


async def test_who_names_several_servers_finds_the_one_that_is_there(servers: Servers) -> None:
    nobody = f"nats://{LOOPBACK}:{free_port()}"
    credentials = load_credentials(servers.members / OPERATOR)
    client = await asyncio.wait_for(
        connect(f"{nobody},{servers.url('c')}", "operator", credentials=credentials), START_S
    )
    assert client.is_connected
    await client.close()
    urls = f"{nobody},{servers.url('c')}"
    for _ in range(4):  # they are tried in any order
        asking = await open_connection(urls, "operator", 5.0, credentials.nats_options)
        assert asking.is_connected
        await asking.close()
    with pytest.raises(RequestError, match=re.escape(nobody)):
        await open_connection(f"{nobody},{nobody}", "operator", 5.0, credentials.nats_options)


async def test_a_site_is_heard_once_and_hears_once(servers: Servers) -> None:
    await servers.until(lambda: "Leafnode connection created for account: EDGE" in servers.log("site"))
    async with (
        servers.member("n0", "site") as agent,
        servers.member(ORCHESTRATOR, "c") as steering,
        servers.member(CLIENT, "b") as client,
    ):
        beats: list[bytes] = []
        plans: list[bytes] = []

        async def beat(message: Msg) -> None:
            beats.append(message.data)

        async def planned(message: Msg) -> None:
            plans.append(message.data)

        async def answer(message: Msg) -> None:
            await agent.publish(message.reply, b"served")

        chat = DeploymentName("chat")
        await steering.subscribe(subjects.ALL_CAPACITY, cb=beat)
        await agent.subscribe(subjects.ALL_PLANS, cb=planned)
        await agent.subscribe(subjects.infer(chat), subjects.INGRESS_QUEUE, cb=answer)
        for one in (steering, agent):
            await settle(one)
        async with asyncio.timeout(START_S):
            while True:  # what somebody listens for is known at the other servers a moment later
                try:
                    assert (await client.request(subjects.infer(chat), b"x", 1.0)).data == b"served"
                    break
                except (NatsError, TimeoutError):
                    await asyncio.sleep(0.1)
        for number in range(20):
            await agent.publish(subjects.capacity(N0), b"%d" % number)
            await steering.publish(subjects.plan(chat), b"%d" % number)
        wanted = [b"%d" % number for number in range(20)]
        await servers.until(lambda: len(beats) >= 20 and len(plans) >= 20)
        await asyncio.sleep(0.5)  # for what comes twice
        assert beats == wanted and plans == wanted
        # And what agents ask of JetStream, the servers answer that it hangs on.
        await kept_thrice(steering.jetstream())
        await steering.jetstream().add_stream(name=subjects.STREAM_PLANS, subjects=[subjects.ALL_PLANS], num_replicas=3)
        assert (await agent.jetstream().stream_info(subjects.STREAM_PLANS)).config.num_replicas == 3


async def test_nobody_who_steers_logs_in_at_a_site(servers: Servers) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3):
            async with servers.member(ORCHESTRATOR, "site"):
                pytest.fail("an orchestrator is let in at a leaf node")
    async with servers.member("n1", "site"):
        pass


@contextmanager
def running(folder: Path) -> Iterator[Path]:
    """One more server, of the files in `folder`; its log."""
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([nats_server_binary(), "-c", SERVER_FILE], cwd=folder, stdout=log, stderr=log)
    try:
        yield folder / "log"
    finally:
        process.kill()
        process.wait(STOP_S)


@contextmanager
def impostor(servers: Servers, folder: Path, change: Callable[[Path], None]) -> Iterator[Path]:
    """One more server that would be a part of the cluster, made as the others are and then changed; its log."""
    ports = {**servers.ports, "d": Ports(LOOPBACK, free_port(), free_port(), free_port())}
    shutil.copytree(servers.folders["a"], folder, ignore=shutil.ignore_patterns("jetstream", "log"))
    text = (folder / SERVER_FILE).read_text().replace('server_name: "a"', 'server_name: "d"')
    for what in ("clients", "routes", "leaves"):
        text = text.replace(str(getattr(ports["a"], what)), str(getattr(ports["d"], what)))
    (folder / SERVER_FILE).write_text(text)
    change(folder)
    with running(folder) as log:
        yield log


async def test_a_members_login_is_no_leaf_nodes(servers: Servers, tmp_path: Path) -> None:
    folder = tmp_path / "leaf"
    shutil.copytree(servers.folders["site"], folder, ignore=shutil.ignore_patterns("log"))
    text = (folder / SERVER_FILE).read_text().replace('server_name: "site"', 'server_name: "other"')
    (folder / SERVER_FILE).write_text(text.replace(str(servers.ports["site"].clients), str(free_port())))
    seed = (servers.members / "n0" / "n0.nk").read_text()
    (folder / LEAF_SEED).write_text(f"nkey: {seed}\n")
    with running(folder) as log:
        await servers.until(lambda: "uthorization Violation" in log.read_text())


def test_who_leaves_is_out_at_every_server(servers: Servers, tmp_path: Path) -> None:
    cluster = tmp_path / "cluster"
    shutil.copytree(servers.cluster, cluster, ignore=shutil.ignore_patterns("jetstream", "log"))
    key = load_credentials(servers.members / "n1").login.nkey
    texts = [path.read_text() for path in cluster.rglob(LOGINS_FILE)]
    assert len(texts) == 5 and all(key in text for text in texts)
    revoke(cluster, NodeId("n1"), [load_holder(cluster / "root-0.key")], now=datetime.now(UTC))
    texts = [path.read_text() for path in cluster.rglob(LOGINS_FILE)]
    assert len(texts) == 5 and not any(key in text for text in texts)
    leaf = (cluster / "servers" / "site" / "leaf.pub").read_text()
    assert sum(leaf in text for text in texts) == 4, "the leaf node's own login is at all but itself"


async def test_a_cluster_serves_over_three_servers_and_a_site(servers: Servers, tmp_path: Path) -> None:
    """An orchestrator at one server, an agent behind the leaf node, an operator and a client at others."""
    store = tmp_path / "store"
    shutil.copytree(Path(models.__path__[0]) / "adder" / "store", store)
    with ExitStack() as stack:

        def process(*arguments: str) -> None:
            log = stack.enter_context((tmp_path / f"{arguments[0]}.log").open("wb"))
            running = subprocess.Popen([sys.executable, "-m", "resplit", *arguments], stdout=log, stderr=log, cwd=ROOT)
            stack.callback(running.wait, STOP_S)
            stack.callback(running.terminate)

        keys = servers.members
        process(
            "orchestrator", "--keys", str(keys / ORCHESTRATOR), "--url", servers.url("a", "b"), "--store", str(store)
        )
        options = ("--store", str(tmp_path / "own"), "--threads", "1", "--provider", "cpu")
        process("agent", "n0", "--keys", str(keys / "n0"), "--url", servers.url("site"), *options)
        request = DeployRequest(name=DeploymentName("sum"), model="adder", settings=Settings(context_tokens=64))
        operator = Access(servers.url("b"), keys / OPERATOR)
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(ResplitError):  # nobody leads yet
                    if (await control.status(operator)).nodes:
                        break
                await asyncio.sleep(0.2)
            await control.deploy_and_wait(operator, request, 60)

        async with Client(servers.url("c"), keys=keys / CLIENT) as client:
            answer = await client.complete("sum", "348+1275=", max_tokens=8)
            assert answer.text.split("|")[0][::-1] == str(348 + 1275)


async def test_a_member_cannot_pass_for_a_server(servers: Servers, tmp_path: Path) -> None:
    def as_member(folder: Path) -> None:
        for file, end in ((SERVER_CERTIFICATE, "pem"), (SERVER_KEY, "key")):
            shutil.copy(servers.members / "n0" / f"n0.tls.{end}", folder / file)

    def as_lone_server(folder: Path) -> None:  # of the same authority, but not made to be a route
        certify(servers.cluster, [LOOPBACK], servers.key, now=datetime.now(UTC), into=folder)

    def refused() -> int:
        return sum(servers.log(name).count("Authentication Failure") for name in "abc")

    for number, change in enumerate((as_member, as_lone_server)):
        before = refused()
        with impostor(servers, tmp_path / f"d{number}", change) as log:
            await servers.until(lambda before=before: refused() > before)  # type: ignore[misc]
            assert "JetStream cluster new metadata leader" not in log.read_text()
    with impostor(servers, tmp_path / "d", lambda folder: None) as log:  # with the right certificate it is one of them
        await servers.until(lambda: "JetStream cluster new metadata leader" in log.read_text())
