"""The demonstration: a model cut over several agents answers like the whole model, and how long it took.

The model adds: it answers `348+1275=` with `3261|1623`, the sum backwards and then forwards. So an answer
can be checked twice: token for token against the uncut model, and by arithmetic.
"""

import asyncio
import itertools
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from agent.sampling import choose
from models.reference import Reference
from models.store import Store
from models.text import Text
from resplit.client import Client
from resplit.cluster import LocalCluster
from resplit.control import deploy_and_wait
from resplit.disturb import SETTINGS as STREAM_SETTINGS
from resplit.disturb import STREAM_TOKENS, Disturbance, Streamed, disturb, prompts
from resplit.replies import RequestError, Usage
from schemas.base import DeploymentName, Digest
from schemas.control import DeployRequest
from schemas.deployment import Settings
from schemas.errors import ErrorCode, ResplitError
from schemas.frame import Sampling

MODEL = "adder"
DEPLOYMENT = DeploymentName("adder")
MAX_TOKENS = 20
"""The longest answer is 13 tokens and its end; this leaves room for a wrong one."""
CONTEXT_TOKENS = 64
CHUNK_TOKENS = 8
"""Short, so that even a prompt of a dozen tokens is prefilled in several chunks."""
TEMPERATURE = 0.8
SAMPLED_ONE_IN = 3
DEPLOY_S = 60.0
DISTURBED_AGENTS_MIN = 3
"""Two that run the model, and one to take over."""
SILENCE_S = 15.0
"""A sum takes a fraction of a second; silence this long is a failure to show, not to sit through."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Problem:
    """One sum; `seed` is None for a greedy answer, else the seed of a sampled one."""

    left: int
    right: int
    seed: int | None

    @property
    def prompt(self) -> str:
        return f"{self.left}+{self.right}="

    @property
    def answer(self) -> str:
        total = str(self.left + self.right)
        return f"{total[::-1]}|{total}"


@dataclass(frozen=True)
class Answer:
    """What the cluster said to one problem, with the times its client measured."""

    problem: Problem
    token_ids: tuple[int, ...]
    text: str
    ttft_ms: float
    tpot_ms: float | None
    usage: Usage
    expected_ids: tuple[int, ...] = ()
    """What the uncut model says."""

    @property
    def is_identical(self) -> bool:
        return self.token_ids == self.expected_ids

    @property
    def is_right(self) -> bool:
        return self.text == self.problem.answer


@dataclass(frozen=True)
class Outcome:
    """Everything the demonstration found out."""

    answers: tuple[Answer, ...]
    errors: tuple[str, ...]
    weight_bytes: tuple[int, ...]
    """Of each block of the model."""
    start_s: float
    """Until every process was up and every agent had reported."""
    deploy_s: float
    """Until the blocks were fetched, verified, loaded and warm on every agent."""
    serve_s: float
    """From the first request sent to the last token received."""
    disturbances: tuple[Disturbance, ...] = ()
    streams: int = 0
    """Streams that ran to their end while the cluster was disturbed."""
    unbroken: int = 0
    """Those whose every token is the uncut model's."""
    stream_errors: tuple[str, ...] = ()
    decision: str = ""
    """The orchestrator's last one, in its words."""

    @property
    def tokens(self) -> int:
        return sum(len(answer.token_ids) for answer in self.answers)

    @property
    def all_well(self) -> bool:
        """No request failed, and every answer is the uncut model's, token for token."""
        well = bool(self.answers) and not self.errors and all(a.is_identical for a in self.answers)
        return well and not self.stream_errors and self.unbroken == self.streams


async def run_demo(models: Path, agents: int, requests: int, seed: int, say: Say) -> Outcome:
    """Run a cluster in a temporary folder, ask it `requests` sums at once, and compare; leaves nothing behind.

    `models` is a store with a model called `adder`, such as the one that is shipped.
    """
    problems = draw_problems(requests, seed)
    with tempfile.TemporaryDirectory(prefix="resplit-demo-") as scratch:
        # A copy: an installation may be read-only, and opening a store makes folders in it.
        store = Store(Path(shutil.copytree(models, Path(scratch) / "store")))
        digest = store.resolve(MODEL)
        manifest = store.manifest(digest)
        stages = min(agents, len(manifest.blocks))
        say(f"starting NATS, an orchestrator and {agents} agents")
        started = time.perf_counter()
        async with LocalCluster(Path(scratch) / "cluster", store.root, agents) as cluster:
            up = time.perf_counter()
            say(f"cutting {MODEL}, {len(manifest.blocks)} blocks, into {stages} stages")
            await deploy_and_wait(cluster.operator, deployment(digest, stages, requests), DEPLOY_S)
            ready = time.perf_counter()
            say(f"asking {requests} sums at once")
            answers, errors = await ask_all(cluster, problems)
            done = time.perf_counter()
            disturbed = None
            if agents >= DISTURBED_AGENTS_MIN:
                say("and now streams that never pause, while nodes slow, end and join")
                disturbed = await disturb(cluster, DEPLOYMENT, digest, say)
        say("asking the uncut model the same")
        compared = await asyncio.to_thread(compare, store, digest, answers)
        weights = tuple(block.weight_bytes for block in manifest.blocks)
        outcome = Outcome(compared, errors, weights, up - started, ready - up, done - ready)
        if disturbed is None:
            return outcome
        disturbances, load, decision = disturbed
        unbroken = await asyncio.to_thread(count_unbroken, store, digest, load.streamed)
    return replace(
        outcome,
        disturbances=disturbances,
        streams=len(load.streamed),
        unbroken=unbroken,
        stream_errors=tuple(load.errors),
        decision=decision,
    )


def shipped_store() -> Path:
    """The store with the adder that comes with Resplit, beside the code that trained it."""
    spec = find_spec("models.adder")
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent / "store"
    if folder is None or not folder.is_dir():
        raise ResplitError(ErrorCode.UNKNOWN_MODEL, "this installation comes without the demonstration's model")
    return folder


def draw_problems(count: int, seed: int) -> list[Problem]:
    """The same sums for the same seed; every third is to be answered by seeded sampling."""
    draw = random.Random(seed)

    def operand() -> int:
        return draw.randrange(10 ** draw.randint(1, 5))

    return [
        Problem(operand(), operand(), draw.randrange(1 << 31) if i % SAMPLED_ONE_IN == SAMPLED_ONE_IN - 1 else None)
        for i in range(count)
    ]


def deployment(model: Digest, stages: int, requests: int) -> DeployRequest:
    """How the demonstration runs the model: every agent takes part, and every sum is computed at once."""
    settings = Settings(
        chunk_tokens=CHUNK_TOKENS,
        context_tokens=CONTEXT_TOKENS,
        max_sequences=min(requests, 32),
        max_queued=max(64, requests),
    )
    return DeployRequest(name=DEPLOYMENT, model=model, settings=settings, stages=stages)


async def ask_all(cluster: LocalCluster, problems: list[Problem]) -> tuple[list[Answer], tuple[str, ...]]:
    """Ask all sums at the same time: the answers, and what went wrong with the others."""
    async with Client(cluster.url, keys=cluster.client_keys, idle_timeout_s=SILENCE_S) as client:
        results = await asyncio.gather(*(ask(client, problem) for problem in problems), return_exceptions=True)
    answers = [result for result in results if isinstance(result, Answer)]
    errors = [result for result in results if isinstance(result, RequestError)]
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, RequestError):
            raise result
    return answers, tuple(str(error) for error in errors)


async def ask(client: Client, problem: Problem) -> Answer:
    """Stream one answer and time it as its reader sees it."""
    sent = time.perf_counter()
    first: float | None = None
    fields: dict[str, Any] = {} if problem.seed is None else {"temperature": TEMPERATURE, "seed": problem.seed}
    tokens = []
    async for token in client.stream(DEPLOYMENT, problem.prompt, max_tokens=MAX_TOKENS, **fields):
        first = first or time.perf_counter()
        tokens.append(token)
    ended = time.perf_counter()
    usage = tokens[-1].usage
    assert first is not None
    assert usage is not None
    return Answer(
        problem,
        tuple(token.token_id for token in tokens),
        "".join(token.text for token in tokens),
        (first - sent) * 1e3,
        (ended - first) * 1e3 / (len(tokens) - 1) if len(tokens) > 1 else None,
        usage,
    )


def compare(store: Store, model: Digest, answers: list[Answer]) -> tuple[Answer, ...]:
    """The answers with what the uncut model says: one session, one sequence at a time, the same prefill chunks."""
    reference = Reference(store, model, "cpu", threads=1)
    spec = store.manifest(model).text
    assert spec is not None
    text = Text(spec, store.path(spec.tokenizer.digest))

    def expected(problem: Problem) -> tuple[int, ...]:
        sampling = Sampling() if problem.seed is None else Sampling(TEMPERATURE, seed=problem.seed)
        index = itertools.count()
        return tuple(
            reference.generate(
                text.encode(problem.prompt),
                MAX_TOKENS,
                CHUNK_TOKENS,
                CONTEXT_TOKENS,
                lambda logits: choose(logits, sampling, next(index)).token,
            )
        )

    return tuple(replace(answer, expected_ids=expected(answer.problem)) for answer in answers)


def count_unbroken(store: Store, model: Digest, streamed: Sequence[Streamed]) -> int:
    """How many streams are the uncut model's, token for token."""
    reference = Reference(store, model, "cpu", threads=1)
    spec = store.manifest(model).text
    assert spec is not None
    text = Text(spec, store.path(spec.tokenizer.digest))
    settings = STREAM_SETTINGS
    expected = {
        prompt: tuple(
            reference.generate(
                text.encode(prompt),
                STREAM_TOKENS,
                settings.chunk_tokens,
                settings.context_tokens,
                stop_at_eos=False,
            )
        )
        for prompt in prompts(streamed)
    }
    return sum(stream.token_ids == expected[stream.prompt] for stream in streamed)
