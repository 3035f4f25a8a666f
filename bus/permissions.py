"""PURE: what each member of a cluster may publish and hear on the bus: the least that its part needs, with the reason.

The table is written as allow lists and nothing else. NATS has two more things to offer, and neither is used:

- `deny` is for what a wide `allow` lets through. Nothing here is wider than is needed, so there is nothing to deny.
- `allow_responses` lets a member answer wherever a message that it got asks to be answered, past every list. A member
  that may publish to a subject which it hears itself then needs only address itself, with the subject that it wants
  as the return address. So answers go to inboxes that are named here, by the part their owner plays.

Each member hears its own inbox alone, `_INBOX.<role>.<name>`: NATS matches whole words between dots, so it is the
role in the middle that lets an agent answer every client and no orchestrator.

What no list can prevent, because nats-server publishes its own answers past all of them: a return address is not
checked, nor where a consumer delivers to (nats-server issue 8274). Whoever may ask JetStream anything can have the
*answer* published on a subject of its choice: over a key of desired state, say, or into the log of plans until no
plan is left in it. So there are two accounts. Those who steer and watch are in CONTROL, with all that JetStream keeps;
agents and clients are at the EDGE, whose few questions to CONTROL are answered at the EDGE. And no agent may make a
consumer or ask for a message as it was stored: both are answered with bytes that somebody chose.

A site that is the home of deployments has both accounts once more, with what is kept there (`docs/decisions/0044`).
Members at the EDGE reach its account CONTROL under the site's name (`subjects.at_edge`), wherever they are.

Nor can a list say what a stream that may be made or changed is to hold: with another stream as its source, those who
make streams (orchestrators, archivists) could read what they may not, the journal among it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bus.credentials import API_OF, Login, inbox_prefix
from schemas import subjects
from schemas.base import DeploymentName, Digest, Home, NodeId, RequestId, SiteId
from schemas.leader import LEASE_KEY
from schemas.roster import Role

STREAMS = (subjects.STREAM_PLANS, subjects.STREAM_RECEIPTS, subjects.STREAM_AUDIT, subjects.STREAM_JOURNAL)
BUCKETS = (subjects.BUCKET_DEPLOYMENTS, subjects.BUCKET_NODES, subjects.BUCKET_LEADER)
EVERY_NODE = NodeId("*")
EVERY_DEPLOYMENT = DeploymentName("*")
EVERY_FILE = Digest("*")
EVERY_REQUEST = RequestId("*")
READING_VERBS = ("status", "explain", "where")
"""Questions to the orchestrator that change nothing and cost it little."""

Api = Literal[
    "STREAM.INFO", "STREAM.CREATE", "STREAM.UPDATE", "STREAM.DELETE", "STREAM.PURGE", "STREAM.MSG.GET",
    "CONSUMER.CREATE", "CONSUMER.MSG.NEXT",
]  # fmt: skip

EDGE_CALLS: tuple[tuple[Api, str], ...] = (
    ("STREAM.INFO", subjects.STREAM_PLANS),
    ("STREAM.MSG.GET", subjects.STREAM_PLANS),
    ("STREAM.INFO", subjects.STREAM_JOURNAL),
    ("STREAM.MSG.GET", subjects.STREAM_JOURNAL),
    ("STREAM.PURGE", subjects.STREAM_JOURNAL),
)


@dataclass(frozen=True)
class Grant:
    """One line of the table: a subject, wildcards included, and why the member needs it."""

    subject: str
    why: str
    queue: str | None = None
    """Subscriptions only: heard as one of this queue group, never by oneself."""


@dataclass(frozen=True)
class Permissions:
    """All that one login may do. Neither list is ever empty: nats-server takes an empty list for "everything"."""

    publish: tuple[Grant, ...]
    subscribe: tuple[Grant, ...]

    def __post_init__(self) -> None:
        assert self.publish and self.subscribe, "an empty list would allow everything"


def allowed(login: Login, sites: Sequence[SiteId] = ()) -> Permissions:
    """What `login` may do, by its role and for its own name, where `sites` are homes beside the hub."""
    match login.role:
        case "agent":
            return _agent(login.name, login.home, (None, *sites))
        case "orchestrator":
            return _orchestrator(login.name, login.home)
        case role:
            return TABLE[role](login.name)


def _agent(name: NodeId, home: Home, homes: Sequence[Home]) -> Permissions:
    own_inbox = f"{inbox_prefix('agent', name)}.>"
    return Permissions(
        publish=(
            # What it says of itself. Others' names stand in others' subjects, so it cannot speak for them.
            Grant(subjects.capacity(name), "its own heartbeat"),
            *_at(homes, Grant(subjects.receipt(name), "its own answers to plans")),
            *_at((home,), Grant(subjects.audit(name, "*"), "its own audit events")),
            # What it says to others, whoever they are: plans change, logins do not change with them.
            Grant(subjects.activation(EVERY_NODE), "frames and pings where no direct link exists, signed by it"),
            Grant(
                subjects.infer(EVERY_DEPLOYMENT),
                "asks the services of pipelines; hands a request on that reached it after its plan was retired",
            ),
            Grant(subjects.cancel(EVERY_REQUEST), "cancels what it asked of a service"),
            Grant(subjects.blob(EVERY_FILE), "asks for files"),
            Grant(subjects.blob_of_all(EVERY_FILE), "asks every holder of a file"),
            Grant(inbox_of_all("client"), "replies to requests, also to those it inherited"),
            Grant(inbox_of_all("agent"), "pieces of files and answers to pings; what it says to itself"),
            *_at(
                homes,
                # The journal is one stream for all: a life is fenced and inherited by others than who wrote it.
                Grant(subjects.ALL_JOURNAL, "journals of its own lives, and fences on lives that ended"),
                Grant(edge_api("STREAM.INFO", subjects.STREAM_JOURNAL), "which lives of a deployment are journalled"),
                Grant(edge_api("STREAM.MSG.GET", subjects.STREAM_JOURNAL), "what an ended life owes"),
                Grant(
                    edge_api("STREAM.PURGE", subjects.STREAM_JOURNAL),
                    "removes what nobody needs of its own and fenced lives",
                ),
                # Plans, read again after every silence.
                Grant(
                    edge_api("STREAM.INFO", subjects.STREAM_PLANS), "whether the orchestrator has made the streams yet"
                ),
                Grant(edge_api("STREAM.MSG.GET", subjects.STREAM_PLANS), "the newest plan of each deployment"),
            ),
        ),
        subscribe=(
            Grant(own_inbox, "answers to itself"),
            *_at(
                homes,
                Grant(subjects.ALL_PLANS, "plans, all of them: it opens what is for it"),
                Grant(subjects.LEADER, "the word of a new leader, which ends the one before"),
                Grant(subjects.BEACON, "what is newest, so that what is withheld is missed"),
                Grant(subjects.ROSTER, "who belongs to the cluster, as its root signed it"),
            ),
            Grant(subjects.ROSTER_NEWEST, "asked by clients who belongs", subjects.ROSTER_QUEUE),
            *_at((home,), Grant(subjects.staging(name), "advice on what to have on its own disk")),
            Grant(subjects.ALL_CAPACITY, "who its peers are, where their links listen, who is silent"),
            Grant(subjects.activation(name), "frames for itself and nobody else"),
            # Which deployments it serves is a matter of plans; it gets a share of their requests, never all of them.
            Grant(subjects.infer(EVERY_DEPLOYMENT), "requests", subjects.INGRESS_QUEUE),
            Grant(subjects.ALL_CANCEL, "cancellations of requests that it may be serving"),
            Grant(subjects.blob(EVERY_FILE), "asked for files that it holds", subjects.BLOB_QUEUE),
            Grant(subjects.blob_of_all(EVERY_FILE), "the same, of every holder at once"),
        ),
    )


def _orchestrator(name: NodeId, home: Home) -> Permissions:
    elsewhere = () if home is None else (Grant(subjects.ROSTER_OF_HUB, "the same, as it is published at the hub"),)
    return Permissions(
        publish=(
            Grant(subjects.ALL_PLANS, "plans"),
            Grant(subjects.LEADER, "its term, which fences the leader before it"),
            Grant(subjects.BEACON, "what is newest, every few seconds"),
            Grant(subjects.ROSTER, "the roster in its folder, where the bus has none as new"),
            Grant(subjects.staging(EVERY_NODE), "advice on what to have on disk"),
            Grant(subjects.ALL_STANDBYS, "says that it stands by, under the name of its process"),
            # All orchestrators are one member, and have one place in the trail.
            Grant(subjects.audit(name, "*"), "its audit events"),
            # Desired state and the lease.
            Grant(f"$KV.{subjects.BUCKET_DEPLOYMENTS}.*", "what operators want deployed"),
            Grant(f"$KV.{subjects.BUCKET_NODES}.*", "what operators want of nodes"),
            Grant(f"$KV.{subjects.BUCKET_LEADER}.{LEASE_KEY}", "claims, renews and gives up the lease"),
            *(Grant(api("STREAM.MSG.GET", f"KV_{bucket}"), "reads it") for bucket in BUCKETS),
            # The streams, which it makes. It cannot delete or purge any, nor remove a message, and it may not change
            # the limits of the audit stream: they could be made so small that nothing stays in it.
            *(Grant(api("STREAM.CREATE", stream), "makes it") for stream in (*STREAMS, *_streams_of(BUCKETS))),
            *(Grant(api("STREAM.INFO", stream), "looks at it") for stream in (*STREAMS, *_streams_of(BUCKETS))),
            *(
                Grant(api("STREAM.UPDATE", stream), "adds subjects of later releases; has more servers keep it")
                for stream in (*STREAMS, *_streams_of(BUCKETS))
                if stream != subjects.STREAM_AUDIT
            ),
            Grant(api("STREAM.MSG.GET", subjects.STREAM_PLANS), "what leaders before it planned"),
            Grant(
                f"{api('CONSUMER.CREATE', subjects.STREAM_RECEIPTS)}.*.{subjects.ALL_RECEIPTS}", "receipts, in order"
            ),
            Grant(f"{api('CONSUMER.MSG.NEXT', subjects.STREAM_RECEIPTS)}.*", "the next receipt"),
            # Answers.
            Grant(subjects.control("status"), "asks itself whether it is heard"),
            Grant(inbox_of_all("operator"), "answers to operators"),
            Grant(inbox_of_all("observer"), "answers to questions that change nothing"),
            Grant("_R_.>", "answers to the other account, under names of the server: pieces of files"),
            Grant(f"{inbox_prefix('orchestrator', name)}.>", "what it says to itself"),
        ),
        subscribe=(
            Grant(f"{inbox_prefix('orchestrator', name)}.>", "answers to itself"),
            Grant(subjects.ROSTER, "who belongs to the cluster, as its root signed it"),
            *elsewhere,
            Grant(subjects.ROSTER_NEWEST, "asked by those who steer and watch who belongs", subjects.ROSTER_QUEUE),
            Grant(subjects.ALL_CAPACITY, "heartbeats"),
            Grant(subjects.ALL_STANDBYS, "which orchestrators stand by"),
            Grant(subjects.ALL_AUDIT, "the ends of others' chains, to which its checkpoints witness"),
            Grant(subjects.control("*"), "requests of operators"),
            Grant(subjects.blob(EVERY_FILE), "asked for files of models", subjects.BLOB_QUEUE),
            Grant(subjects.blob_of_all(EVERY_FILE), "the same, of every holder at once"),
        ),
    )


def _client(name: NodeId) -> Permissions:
    inbox = f"{inbox_prefix('client', name)}.>"
    return Permissions(
        publish=(
            Grant(subjects.infer(EVERY_DEPLOYMENT), "requests"),
            Grant(subjects.cancel(EVERY_REQUEST), "cancels a request, by an id that nobody can guess"),
            Grant(subjects.ROSTER_NEWEST, "asks who belongs, and so may read what it seals"),
            Grant(inbox, "what it says to itself"),
        ),
        subscribe=(
            Grant(inbox, "replies to its own requests"),
            Grant(subjects.ROSTER, "who belongs from now on"),
        ),
    )


def _operator(name: NodeId) -> Permissions:
    inbox = inbox_prefix("operator", name)
    return Permissions(
        publish=(
            Grant(subjects.control("*"), "deploys, places, removes, drains, trusts, asks"),
            Grant(subjects.ROSTER, "hands round what the root signed"),
            Grant(subjects.ROSTER_NEWEST, "asks who belongs, and so whose events it believes"),
            *_reading(),
            Grant("$JS.API.INFO", "how much JetStream stores (`resplit doctor`)"),
            *(Grant(api("STREAM.INFO", s), "whether it is there") for s in (*STREAMS, *_streams_of(BUCKETS))),
            Grant(f"{inbox}.>", "what it says to itself"),
        ),
        subscribe=(
            Grant(f"{inbox}.>", "answers of the orchestrator and of JetStream"),
            *_watching(),
        ),
    )


def _observer(name: NodeId) -> Permissions:
    return Permissions(
        publish=(
            *(Grant(subjects.control(verb), "asks, and changes nothing") for verb in READING_VERBS),
            Grant(subjects.ROSTER_NEWEST, "asks who belongs, and so whose events it believes"),
            Grant(api("STREAM.INFO", subjects.STREAM_AUDIT), "where the trail ends"),
            *_reading(),
        ),
        subscribe=(
            Grant(f"{inbox_prefix('observer', name)}.>", "the trail, and answers"),
            *_watching(),
        ),
    )


def _archivist(name: NodeId) -> Permissions:
    audit = subjects.STREAM_AUDIT
    return Permissions(
        publish=(
            *_reading(),
            Grant(api("STREAM.INFO", audit), "where the trail ends"),
            Grant(api("STREAM.UPDATE", audit), "has more servers keep it; seals it, before it is exported to its end"),
            Grant(api("STREAM.DELETE", audit), "removes it, once all of it is exported"),
            Grant(api("STREAM.CREATE", audit), "begins it anew behind what was exported"),
        ),
        subscribe=(Grant(f"{inbox_prefix('archivist', name)}.>", "the trail, and answers of JetStream"),),
    )


TABLE: Mapping[Role, Callable[[NodeId], Permissions]] = {
    "client": _client,
    "operator": _operator,
    "observer": _observer,
    "archivist": _archivist,
}


# What passes between the two accounts, and nothing else does. A question from the EDGE is answered at the EDGE, so
# whatever return address it names, the answer reaches no stream and nobody in CONTROL.

HEARD_AT_THE_EDGE = (
    subjects.ALL_PLANS,
    subjects.LEADER,
    subjects.BEACON,
    subjects.ROSTER,
    subjects.staging(EVERY_NODE),
)


def heard_in_control(home: Home) -> Mapping[str, str]:
    """What those who steer at `home` hear of the EDGE, and under which subject; at a site also what the EDGE hears of
    the hub's rosters."""
    heard = {subjects.ALL_CAPACITY: subjects.ALL_CAPACITY}
    return heard if home is None else {**heard, subjects.ROSTER: subjects.ROSTER_OF_HUB}


def heard_at_the_edge(home: Home) -> Mapping[str, str]:
    """What the EDGE hears of those who steer at `home`, and under which subject."""
    return {subject: subjects.at_edge(home, subject) for subject in HEARD_AT_THE_EDGE}


def asked_of_control(home: Home = None) -> Mapping[str, str]:
    """What the EDGE may ask of CONTROL at `home`, and under which subject CONTROL knows it."""
    same = (subjects.receipt(EVERY_NODE), subjects.audit(EVERY_NODE, "*"), subjects.ALL_JOURNAL)
    files = (subjects.blob(EVERY_FILE), subjects.blob_of_all(EVERY_FILE))  # whoever has one may answer
    return {
        **{subjects.at_edge(home, subject): subject for subject in same},
        **{subject: subject for subject in files},
        **{subjects.at_edge(home, edge_api(*call)): api(*call) for call in EDGE_CALLS},
    }


def api(verb: Api, stream: str) -> str:
    """The subject of one call of JetStream's API about one stream, where JetStream is."""
    return f"{API_OF['CONTROL']}.{verb}.{stream}"


def edge_api(verb: Api, stream: str) -> str:
    """The same at the EDGE, from where only `EDGE_CALLS` get through."""
    assert (verb, stream) in EDGE_CALLS
    return f"{API_OF['EDGE']}.{verb}.{stream}"


def inbox_of_all(role: Role) -> str:
    """Every inbox of those who play this part."""
    return f"{inbox_prefix(role, EVERY_NODE)}.>"


def _at(homes: Sequence[Home], *grants: Grant) -> tuple[Grant, ...]:
    """The same of each of `homes`, as an agent names it."""
    return tuple(Grant(subjects.at_edge(home, one.subject), one.why, one.queue) for home in homes for one in grants)


def _reading() -> tuple[Grant, ...]:
    return (
        Grant("$JS.API.STREAM.NAMES", "which stream the audit events are in"),
        Grant(api("CONSUMER.CREATE", subjects.STREAM_AUDIT), "reads the trail in order"),
        Grant(f"$JS.FC.{subjects.STREAM_AUDIT}.>", "says that it keeps up with the trail"),
    )


def _watching() -> tuple[Grant, ...]:
    """What is said in the open among those who steer. Of requests there are figures in it, and no content."""
    return (
        Grant(subjects.ALL_CAPACITY, "heartbeats"),
        Grant(subjects.ALL_PLANS, "that plans are made; what they say is sealed"),
        Grant(subjects.LEADER, "who leads from now on"),
        Grant(subjects.BEACON, "that somebody leads, and what is newest"),
        Grant(subjects.ROSTER, "who belongs from now on"),
        Grant(subjects.ALL_RECEIPTS, "what agents answer to plans"),
        Grant(subjects.ALL_STANDBYS, "which orchestrators stand by"),
        Grant(subjects.ALL_AUDIT, "the trail as it is written"),
    )


def _streams_of(buckets: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"KV_{bucket}" for bucket in buckets)
