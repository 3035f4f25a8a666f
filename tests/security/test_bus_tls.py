"""TLS to the NATS server: who is believed to be it, whom it believes, and what can be read on the way."""

import asyncio
import json
import re
import shutil
import signal
import ssl
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

from bus.certificates import issue_to_server
from bus.connection import MemberClient, connect, settle
from bus.credentials import Credentials
from bus.enrolment import enrol
from bus.founding import found_cluster, load_holder
from bus.identity import load_credentials
from bus.joining import join
from bus.natsconf import LOGINS_FILE, TlsFiles
from bus.pem import certificate_pem, key_pem
from bus.server_certificate import certify, read_server_certificate, server_files
from bus.together import CLIENT, CLUSTER, OPERATOR, make_members
from natstls.client import SafeClient
from natstls.contexts import AUTHORITY
from resplit import Client, RequestError
from resplit.access import Access
from resplit.server import NatsServer
from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError
from tests.conftest import running_server
from tests.security.guarded_bus import GuardedServer, cluster, guarded
from tests.security.wiretap import impostor, tapped

N0 = NodeId("n0")
SOON_S = 15.0
DAY = timedelta(days=1)
PROMPT = "what nobody on the way may read"
ANSWER = "nor this, on its way back"
HANDSHAKE = b"\x16\x03"
"""What a record of TLS begins with while the two sides shake hands."""


def member(name: str) -> Credentials:
    return load_credentials(cluster() / name)


MEMBERS = (N0, CLIENT, OPERATOR)


def serving(folder: Path, tls: TlsFiles | None = None) -> AbstractContextManager[GuardedServer]:
    """A server that lets in the members of the cluster."""
    return guarded(folder, [member(name) for name in MEMBERS], tls)


def certificate_files(
    folder: Path, *hosts: str, since: timedelta = -DAY, until: timedelta = DAY, authority: Path | None = None
) -> TlsFiles:
    """A certificate for `hosts`, from an authority, the cluster's unless told otherwise, to demand the cluster's."""
    folder.mkdir()
    signs = authority or cluster() / CLUSTER
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    certificate = issue_to_server(
        hosts,
        key.public_key(),
        x509.load_pem_x509_certificate((signs / AUTHORITY).read_bytes()),
        load_holder(signs / "root-0.key").authority,
        now + since,
        now + until,
    )
    (folder / "c.pem").write_bytes(certificate_pem(certificate))
    (folder / "k.pem").write_bytes(key_pem(key))
    return TlsFiles(folder / "c.pem", folder / "k.pem", cluster() / CLUSTER / AUTHORITY)


def another_cluster(folder: Path) -> TlsFiles:
    make_members(folder, [])
    return server_files(folder / CLUSTER)


def member_s_own(folder: Path) -> TlsFiles:
    """What any agent has: a certificate of the right authority that is good for a server of links."""
    del folder
    own = cluster() / N0
    return TlsFiles(own / "n0.tls.pem", own / "n0.tls.key", own / AUTHORITY)


async def refusal(url: str, keys: Path | None = None) -> str:
    """Why a client does not connect: one typed error."""
    with pytest.raises(RequestError) as refused:
        async with Client(url, keys=keys or cluster() / CLIENT):
            pass
    assert (refused.value.code, refused.value.field) == ("unreachable", "url"), refused.value
    return str(refused.value)


# Who is believed to be the server


@pytest.mark.parametrize("form", ["nats://127.0.0.1:{}", "tls://127.0.0.1:{}", "localhost:{}"])
async def test_members_connect_over_tls_1_3_whatever_the_url_calls_it(tmp_path: Path, form: str) -> None:
    with serving(tmp_path) as server:
        url = form.format(server.url.rsplit(":", 1)[1])
        one = await connect(url, N0, credentials=member(N0))
        two = await Access(url, cluster() / OPERATOR).connect("test", "operator")
        for client in (one, two):
            assert tls_of(client).version() == "TLSv1.3"
            assert isinstance(client, SafeClient)
            assert client.certificate_until == read_server_certificate(cluster() / CLUSTER).not_after
            await client.close()
        async with Client(url, keys=cluster() / CLIENT):
            pass


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (lambda folder: certificate_files(folder, "nats.example", "10.0.0.2"), "for other hosts .*certify --host"),
        (lambda folder: certificate_files(folder, "127.0.0.1", until=-DAY / 2), "expired.*resplit certify"),
        (lambda folder: certificate_files(folder, "127.0.0.1", since=DAY / 2), "not yet valid.*set the clock"),
        (another_cluster, "did not sign .*server of another cluster"),
        (member_s_own, "for other hosts"),
    ],
    ids=["another name", "expired", "not yet", "another authority", "a member's certificate"],
)
async def test_a_server_with_another_certificate_is_refused_and_told_nothing(
    tmp_path: Path, files: Callable[[Path], TlsFiles], why: str
) -> None:
    with serving(tmp_path / "nats", files(tmp_path / "tls")) as server:
        assert re.search(why, await refusal(server.url))
        with pytest.raises(RequestError, match=why):
            await Access(server.url, cluster() / OPERATOR).connect("test", "operator")


async def test_who_says_for_the_server_that_it_has_no_tls_hears_nothing() -> None:
    """nats-py goes by the greeting whether it has TLS, unless the handshake comes first."""
    said = {"server_id": "x", "version": "2.15.1", "max_payload": 1 << 20, "nonce": "abc", "headers": True}
    async with impostor(b"INFO " + json.dumps(said).encode() + b"\r\n") as tap:
        assert "without TLS" in await refusal(tap.url)
    assert tap.up.startswith(HANDSHAKE) and b"CONNECT" not in tap.up and b"nkey" not in tap.up


async def test_a_server_without_tls_is_refused(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        assert "handshake_first: true" in await refusal(server.url)


async def test_a_server_that_has_no_tls_1_3_is_refused() -> None:
    async with impostor(b"\x15\x03\x01\x00\x02\x02\x46") as tap:  # a fatal alert: protocol_version
        assert "TLS 1.3" in await refusal(tap.url)


async def test_the_system_s_authorities_are_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_members(tmp_path / "others", [])
    theirs = certificate_files(tmp_path / "tls", "127.0.0.1", authority=tmp_path / "others" / CLUSTER)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "others" / CLUSTER / AUTHORITY))
    with serving(tmp_path / "nats", theirs) as server:
        assert "did not sign" in await refusal(server.url)


async def test_a_server_certified_by_others_is_believed_by_who_joined_so_and_by_nobody_else(tmp_path: Path) -> None:
    make_members(tmp_path / "others", [])
    theirs = certificate_files(tmp_path / "tls", "127.0.0.1", authority=tmp_path / "others" / CLUSTER)
    roots, now = [load_holder(cluster() / CLUSTER / "root-0.key")], datetime.now(UTC)
    own = shutil.copytree(cluster() / CLUSTER, tmp_path / "cluster")
    bundle = enrol(own, NodeId("app"), "client", None, DAY, roots, now=now)
    authority = (tmp_path / "others" / CLUSTER / AUTHORITY).read_bytes()
    with pytest.raises(ResplitError, match="certificates in PEM") as refused:
        join(bundle, tmp_path / "app", now, b"no PEM")
    assert (refused.value.code, refused.value.field) == (ErrorCode.INVALID_REQUEST, "server-authority")
    assert not (tmp_path / "app").exists()
    join(bundle, tmp_path / "app", now, authority)
    app = load_credentials(tmp_path / "app")
    with guarded(tmp_path / "nats", [app, member(CLIENT)], theirs) as server:
        async with Client(server.url, keys=tmp_path / "app"):
            pass
        await refusal(server.url)
    with guarded(tmp_path / "again", [app, member(CLIENT)]) as server:
        assert "did not sign" in await refusal(server.url, tmp_path / "app")


# Whom the server believes


async def test_who_speaks_without_tls_gets_nothing(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
        writer.write(b"CONNECT {}\r\nPING\r\nSUB > 1\r\n")
        async with asyncio.timeout(SOON_S):
            assert b"INFO" not in await reader.read()
        writer.close()
        with pytest.raises(RequestError, match="give the folder of a member"):
            async with Client(server.url):
                pass


async def test_who_has_no_certificate_of_the_cluster_does_not_get_to_log_in(tmp_path: Path) -> None:
    make_members(tmp_path / "others", [])
    shutil.copy(cluster() / CLUSTER / AUTHORITY, tmp_path / "others" / CLIENT / AUTHORITY)
    with serving(tmp_path / "nats") as server:
        said = await refusal(server.url, tmp_path / "others" / CLIENT)
        assert "refuses this member's certificate" in said and "resplit rotate" in said
        await logged(server, "certificate signed by unknown authority")
        assert "authentication error" not in server.log


async def logged(server: GuardedServer, words: str) -> None:
    """Wait until the server has written this into its log."""
    async with asyncio.timeout(SOON_S):
        while words not in server.log:  # noqa: ASYNC110 (a log file sends no events)
            await asyncio.sleep(0.02)


async def test_whose_certificate_has_ended_is_not_let_in_though_the_logins_name_it(tmp_path: Path) -> None:
    own, then = tmp_path / "cluster", datetime.now(UTC) - 2 * DAY
    found_cluster(own, now=then)
    bundle = enrol(own, NodeId("app"), "client", None, DAY, [load_holder(own / "root-0.key")], now=then)
    join(bundle, tmp_path / "app", then)
    with guarded(tmp_path / "nats", [load_credentials(tmp_path / "app")], server_files(own)) as server:
        assert "its time is over" in await refusal(server.url, tmp_path / "app")


# While it runs


async def test_a_new_certificate_disturbs_nobody_and_is_the_one_that_others_see(tmp_path: Path) -> None:
    own = shutil.copytree(cluster() / CLUSTER, tmp_path / "cluster")
    authority = load_holder(own / "root-0.key").authority
    with serving(tmp_path / "nats", server_files(own)) as server:
        before = await connect(server.url, N0, credentials=member(N0))
        certify(own, ("nats.example",), authority, now=datetime.now(UTC))
        server.hang_up("Reloaded server configuration")
        after = await connect(server.url, N0, credentials=member(N0))
        assert names_of(before) == {"localhost"} and names_of(after) == {"localhost", "nats.example"}
        await before.flush()
        assert before.is_connected and before.stats["reconnects"] == 0
        await before.close()
        await after.close()


async def test_a_process_says_once_why_and_goes_on_once_the_certificate_is_renewed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = certificate_files(tmp_path / "tls", "127.0.0.1", until=-DAY / 2)
    with serving(tmp_path / "nats", files) as server:
        connecting = asyncio.create_task(connect(server.url, N0, credentials=member(N0)))
        await asyncio.sleep(5)  # several of its attempts
        fresh = certificate_files(tmp_path / "fresh", "127.0.0.1")
        shutil.copy(fresh.key, files.key)
        shutil.copy(fresh.certificate, files.certificate)
        server.hang_up("Reloaded server configuration")
        async with asyncio.timeout(SOON_S):
            client = await connecting
        await client.close()
    told = [record.message for record in caplog.records if "does not hold by the clock" in record.message]
    assert len(told) == 1 and "renew it with `resplit certify`" in told[0]


async def test_a_server_that_hangs_is_given_up_as_soon_as_without_tls(tmp_path: Path) -> None:
    """asyncio waits half a minute for the goodbye of a server, before the first attempt to reconnect."""
    server = NatsServer(
        tmp_path / "nats", (cluster() / CLUSTER / LOGINS_FILE).read_text, server_files(cluster() / CLUSTER)
    )
    await server.start()
    lost, back = asyncio.Event(), asyncio.Event()

    async def on_lost() -> None:
        lost.set()

    async def on_back() -> None:
        back.set()

    client = await connect(server.url, N0, credentials=member(N0), on_lost=on_lost, on_back=on_back)
    server.child.signal(signal.SIGSTOP)
    async with asyncio.timeout(SOON_S):
        await lost.wait()
    server.child.signal(signal.SIGCONT)
    async with asyncio.timeout(SOON_S):
        await back.wait()
    await client.close()
    await server.child.stop()


# What can be read on the way


async def test_a_capture_of_the_wire_holds_nothing_of_a_request_that_is_not_sealed(tmp_path: Path) -> None:
    with serving(tmp_path / "nats") as server:
        agent = await connect(server.url, N0, credentials=member(N0))
        async with tapped(server.url) as tap:
            await ask(agent, Client(tap.url, keys=cluster() / CLIENT))
        await agent.close()
    assert tap.up.startswith(HANDSHAKE) and tap.down.startswith(HANDSHAKE)
    for secret in (PROMPT, ANSWER, "resplit.v1", "INFO", "CONNECT", "nonce", member(CLIENT).login.nkey):
        assert secret.encode() not in tap.up + tap.down


async def test_the_capture_would_show_it_if_it_were_there(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        agent = await connect(server.url, N0)
        async with tapped(server.url) as tap:
            await ask(agent, Client(tap.url))
        await agent.close()
    assert PROMPT.encode() in tap.up and ANSWER.encode() in tap.down


async def ask(agent: Nats, client: Client) -> None:
    """One request with its answer."""

    async def answer(message: Msg) -> None:
        request = json.loads(message.data)["request_id"]
        last = {"request_id": request, "index": 0, "token_id": 1, "text": ANSWER, "finish_reason": "stop"}
        await agent.publish(message.reply, json.dumps(last).encode())

    await agent.subscribe("resplit.v1.infer.chat", "ingress", cb=answer)
    await settle(agent)
    async with client:
        assert [token.text async for token in client.stream("chat", PROMPT)] == [ANSWER]


def tls_of(client: Nats) -> ssl.SSLObject:
    found = client._transport._io_writer.get_extra_info("ssl_object")  # type: ignore[union-attr]
    assert isinstance(found, ssl.SSLObject)
    return found


def names_of(client: MemberClient | Nats) -> set[str]:
    """The host names in the certificate that the server showed."""
    shown = tls_of(client).getpeercert(binary_form=True)
    assert shown is not None
    parsed = x509.load_der_x509_certificate(shown)
    names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return set(names.get_values_for_type(x509.DNSName))
