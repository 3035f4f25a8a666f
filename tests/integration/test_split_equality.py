"""A split model answers, bit for bit, as the unsplit one: every cut, every prompt length, alone and together.

The oracle is the original graph in one session with the same chunk schedule. Equality of the log
probability of every token, in double precision, is equality of every logit that was sampled from.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest

from agent.driver import Prompt
from agent.sampling import Choice, choose
from agent.stage import Queued
from models.reference import Reference
from models.store import Store
from schemas.deployment import Settings
from schemas.frame import Activation, Result, Sampling
from tests import model_zoo
from tests.route_harness import EngineCache, Route, stages

CHUNK = 16
CONTEXT = 128
SETTINGS = Settings(chunk_tokens=CHUNK, context_tokens=CONTEXT, max_sequences=64)
NEW_TOKENS = 8
GREEDY = Sampling(logprobs=5)
# One token, one below and above each of several chunk boundaries, and a few in between.
LENGTHS = [1, 2, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 90]

DECODERS = [
    *("llama-fp32", "llama-int4", "qwen2-fp32", "qwen2-int4", "qwen3-fp32", "qwen3-int4"),
    pytest.param("dynamo-fp32", marks=pytest.mark.slow),  # torch takes half a minute to export it
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("zoo-store"))


@pytest.fixture(scope="module", params=DECODERS)
def oracle(request: pytest.FixtureRequest, zoo: Path, store: Store) -> "Oracle":
    digest = model_zoo.import_decoder(zoo, store, request.param)
    return Oracle(Reference(store, digest, "cpu", 1), EngineCache(store, digest))


class Oracle:
    """The unsplit model's answers to a fixed set of prompts."""

    def __init__(self, reference: Reference, engines: EngineCache) -> None:
        self.engines = engines
        self.count = len(engines.manifest.blocks)
        spec = engines.manifest.text
        assert spec is not None
        rng = np.random.default_rng(0)
        self.prompts = [[int(t) for t in rng.integers(3, spec.vocab_size, n)] for n in LENGTHS]
        self.answers: list[list[Choice]] = []
        for prompt in self.prompts:
            reference.generate(prompt, NEW_TOKENS, chunk_tokens=CHUNK, context_tokens=CONTEXT)
            self.answers.append([choose(logits, GREEDY, i) for i, logits in enumerate(reference.logits)])

    def check(self, cuts: list[int], nodes: list[str] | None = None, prompts: range | None = None) -> None:
        chosen = prompts or range(len(self.prompts))
        route = Route(self.engines, stages(cuts, self.count, nodes), SETTINGS)
        outputs = route.generate([self.prompts[i] for i in chosen], NEW_TOKENS, GREEDY)
        for i, output in zip(chosen, outputs, strict=True):
            got = [Choice(t.token, t.logprob, t.top) for t in output.detailed]
            assert got == self.answers[i], f"cuts {cuts}, prompt of {LENGTHS[i]} tokens"


def test_sixteen_concurrent_sequences_over_every_cut_into_two(oracle: Oracle) -> None:
    for cut in range(1, oracle.count):
        oracle.check([cut])


def test_every_cut_into_three(oracle: Oracle) -> None:
    for cuts in itertools.combinations(range(1, oracle.count), 2):
        oracle.check(list(cuts), prompts=range(0, len(LENGTHS), 3))


def test_every_u_shaped_placement(oracle: Oracle) -> None:
    for cuts in itertools.combinations(range(1, oracle.count), 2):
        oracle.check(list(cuts), nodes=["trusted", "other", "trusted"], prompts=range(1, len(LENGTHS), 3))


def test_one_sequence_alone(oracle: Oracle) -> None:
    for i in range(len(LENGTHS)):
        oracle.check([oracle.count // 2], prompts=range(i, i + 1))


def test_one_session_for_all_layers_of_a_stage(oracle: Oracle) -> None:
    apart = EngineCache(oracle.engines.store, oracle.engines.store.resolve(oracle.engines.manifest.name), fuse=True)
    route = Route(apart, stages([2], oracle.count), SETTINGS)
    outputs = route.generate(oracle.prompts, NEW_TOKENS, GREEDY)
    assert [[Choice(t.token, t.logprob, t.top) for t in o.detailed] for o in outputs] == oracle.answers


def test_sequences_that_end_at_different_times_leave_no_trace_in_the_others(oracle: Oracle) -> None:
    wanted = [1 + i % NEW_TOKENS for i in range(len(LENGTHS))]
    route = Route(oracle.engines, stages([2], oracle.count), SETTINGS)
    outputs = route.generate(oracle.prompts, wanted, GREEDY)
    for output, expected, count in zip(outputs, oracle.answers, wanted, strict=True):
        assert output.tokens == [choice.token for choice in expected[:count]]
    assert all(host.sequences(1) == 0 for host in route.hosts.values())


def test_several_groups_in_flight_change_nothing(oracle: Oracle) -> None:
    settings = SETTINGS.model_copy(update={"pipeline_depth": 3})
    route = Route(oracle.engines, stages([2, 4], oracle.count), settings)
    outputs = route.generate(oracle.prompts, NEW_TOKENS, GREEDY)
    assert [[Choice(t.token, t.logprob, t.top) for t in o.detailed] for o in outputs] == oracle.answers


def test_a_repeated_step_that_meets_its_successor_yields_nothing(oracle: Oracle) -> None:
    """The ingress drives a step again; the repeat waits at a stage until the next step is there too."""
    route = Route(oracle.engines, stages([2], oracle.count), SETTINGS)
    first, last = (route.hosts[stage.node] for stage in route.stages)
    route.driver.admit(Prompt(0, tuple(oracle.prompts[2]), CONTEXT, GREEDY))
    steps: list[Activation] = []
    for now in range(3):
        [step] = route.driver.frames(now)
        steps.append(step)
        [onward] = first.run([Queued(step, 0)])
        assert isinstance(onward, Activation)
        [result] = last.run([Queued(onward, 0)])
        assert isinstance(result, Result)
        [answered] = route.driver.take(result, now)
        assert answered.token is not None
        route.driver.go_on(0, answered.token.token)
    [newest] = route.driver.frames(3)
    ran = first.run([Queued(steps[-1], 0), Queued(newest, 0)])
    assert [frame.items for frame in ran if isinstance(frame, Activation)] == [newest.items]
