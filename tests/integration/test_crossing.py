"""Sequences cross from one cut to another while they decode, and answer bit for bit as if nothing had happened."""

import itertools
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from agent.sampling import Choice, choose
from models.reference import Reference
from models.store import Store
from schemas.base import NodeId
from schemas.deployment import Settings, Stage
from schemas.frame import Sampling
from schemas.tensor import Array
from tests import model_zoo
from tests import nodes as nodes_module
from tests.nodes import Ingress, Nodes, Sequence, plan_of
from tests.route_harness import EngineCache, stages

CHUNK = 16
SETTINGS = Settings(chunk_tokens=CHUNK, context_tokens=128, max_sequences=16)
SAMPLINGS = [Sampling(logprobs=5), Sampling(temperature=0.8, top_k=20, seed=7, logprobs=5)]
LENGTHS = [1, 5, 16, 17, 31, 40, 64, 70]
WANTED = 40


@pytest.fixture(
    scope="module",
    params=["llama-fp32", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3-int4", "dynamo-fp32"))],
)
def oracle(request: pytest.FixtureRequest, zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> "Oracle":
    store = Store(tmp_path_factory.mktemp("store"))
    digest = model_zoo.import_decoder(zoo, store, request.param)
    return Oracle(Reference(store, digest, "cpu", 1), EngineCache(store, digest))


def _pick(sampling: Sampling, chosen: list[Choice], logits: Array) -> int:
    chosen.append(choose(logits, sampling, len(chosen)))
    return chosen[-1].token


class Oracle:
    """What the unsplit model says, greedily and sampled."""

    def __init__(self, reference: Reference, engines: EngineCache) -> None:
        self.engines, self.reference = engines, reference
        self.count = len(engines.manifest.blocks)
        spec = engines.manifest.text
        assert spec is not None
        rng = np.random.default_rng(1)
        self.prompts = [[int(t) for t in rng.integers(3, spec.vocab_size, n)] for n in LENGTHS]
        self.answers: list[list[Choice]] = []
        for i, prompt in enumerate(self.prompts):
            self.answers.append(self.answer(prompt, WANTED, SAMPLINGS[i % 2]))

    def answer(self, prompt: list[int], count: int, sampling: Sampling) -> list[Choice]:
        """What the unsplit model says to a prompt."""
        chosen: list[Choice] = []
        pick = partial(_pick, sampling, chosen)
        self.reference.generate(prompt, count, CHUNK, SETTINGS.context_tokens, pick, stop_at_eos=False)
        return chosen

    def ask_all(self, ingress: Ingress) -> list[Sequence]:
        return [ingress.ask(prompt, WANTED, SAMPLINGS[i % 2]) for i, prompt in enumerate(self.prompts)]

    def check(self, sequences: list[Sequence]) -> None:
        for i, sequence in enumerate(sequences):
            got = [Choice(t.token, t.logprob, t.top) for t in sequence.out]
            assert got == self.answers[i], f"prompt of {LENGTHS[i]} tokens"


def cut(oracle: Oracle, draw: random.Random) -> list[Stage]:
    """A random cut into one to four stages on four nodes, a node twice at most as the two ends of a U."""
    size = draw.randint(1, 4)
    cuts = sorted(draw.sample(range(1, oracle.count), size - 1))
    nodes = draw.sample(["n0", "n1", "n2", "n3"], size)
    if size > 2 and draw.random() < 0.5:
        nodes[-1] = nodes[0]
    return stages(cuts, oracle.count, nodes)


def test_a_cut_that_moves_leaves_no_trace_and_moves_only_what_moved(oracle: Oracle) -> None:
    nodes = Nodes(oracle.engines, SETTINGS)
    ingress = Ingress(nodes)
    before, after = stages([3], oracle.count, ["n0", "n1"]), stages([2], oracle.count, ["n0", "n1"])
    ingress.commit(plan_of(1, before, SETTINGS, oracle.count))
    sequences = oracle.ask_all(ingress)
    ingress.run(90)
    ingress.commit(plan_of(2, after, SETTINGS, oracle.count))
    ingress.run()
    oracle.check(sequences)
    assert ingress.crossed == len(LENGTHS)
    assert ingress.recomputed == 0
    assert set(nodes.moved) == {2}
    used = sum(LENGTHS) + len(LENGTHS) * WANTED
    assert 0 < nodes.moved[2] < used, "the used part of each cache, once"
    ingress.runs[2].drop_kept()
    while nodes.deliver_one():
        pass
    ingress.retire()
    assert all(host.sequences(epoch) == 0 for host in nodes.hosts.values() for epoch in (1, 2))


@pytest.mark.parametrize(("frame_s", "most"), [(0.0001, len(LENGTHS) - 1 - 2), (0.05, 1)])
def test_whoever_crosses_first_tells_how_many_may_at_once(
    oracle: Oracle, monkeypatch: pytest.MonkeyPatch, frame_s: float, most: int
) -> None:
    monkeypatch.setattr(nodes_module, "STEP_S", frame_s)
    ingress = Ingress(Nodes(oracle.engines, SETTINGS))
    ingress.commit(plan_of(1, stages([3], oracle.count, ["n0", "n1"]), SETTINGS, oracle.count))
    sequences = oracle.ask_all(ingress)
    ingress.run(90)
    ingress.commit(plan_of(2, stages([2], oracle.count, ["n0", "n1"]), SETTINGS, oracle.count))
    under_way = [0]
    while ingress.live:
        ingress.run(1)
        under_way.append(len(ingress.crossings))
    oracle.check(sequences)
    assert ingress.crossed > 0
    assert ingress.recomputed == 0
    begun = [after for before, after in itertools.pairwise(under_way) if after > before]
    assert begun[0] == 1, "one goes first"
    assert max(begun) == most


@pytest.mark.parametrize("seed", range(3))
def test_random_cuts_one_after_the_other(oracle: Oracle, seed: int) -> None:
    draw = random.Random(seed)
    ingress = Ingress(Nodes(oracle.engines, SETTINGS, seed))
    ingress.commit(plan_of(1, cut(oracle, draw), SETTINGS, oracle.count))
    sequences = oracle.ask_all(ingress)
    for epoch in range(2, 6):
        ingress.run(draw.randint(0, 60))
        ingress.retire()
        ingress.commit(plan_of(epoch, cut(oracle, draw), SETTINGS, oracle.count))
    ingress.run()
    oracle.check(sequences)
    assert ingress.recomputed == 0


@pytest.mark.parametrize("seed", range(3))
def test_frames_that_are_lost_or_come_twice(oracle: Oracle, seed: int) -> None:
    draw = random.Random(1000 + seed)
    ingress = Ingress(Nodes(oracle.engines, SETTINGS, seed, lossy=0.02))
    ingress.commit(plan_of(1, cut(oracle, draw), SETTINGS, oracle.count))
    sequences = oracle.ask_all(ingress)
    for epoch in range(2, 4):
        ingress.run(draw.randint(0, 120))
        ingress.retire()
        ingress.commit(plan_of(epoch, cut(oracle, draw), SETTINGS, oracle.count))
    ingress.run()
    oracle.check(sequences)


def test_replaying_what_came_out_gives_the_same_bits(oracle: Oracle) -> None:
    nodes = Nodes(oracle.engines, SETTINGS)
    ingress = Ingress(nodes)
    ingress.commit(plan_of(1, stages([2], oracle.count, ["n0", "n1"]), SETTINGS, oracle.count))
    sequences = oracle.ask_all(ingress)
    ingress.run(90)
    for number in list(ingress.live):
        ingress._recompute(number)
    nodes.hosts.pop(NodeId("n1"))  # its caches are gone
    nodes.plans.clear()
    ingress.commit(plan_of(2, stages([1], oracle.count, ["n0", "n2"]), SETTINGS, oracle.count))
    ingress.run()
    oracle.check(sequences)


def test_fast_recovery_says_what_a_prompt_of_all_that_came_out_would_be_answered(oracle: Oracle) -> None:
    fast = SETTINGS.model_copy(update={"recovery": "fast"})
    nodes = Nodes(oracle.engines, fast)
    ingress = Ingress(nodes)
    ingress.commit(plan_of(1, stages([2], oracle.count, ["n0", "n1"]), fast, oracle.count))
    sequences = [ingress.ask(prompt, WANTED, SAMPLINGS[0]) for prompt in oracle.prompts[:5]]
    ingress.run(90)
    known = [[token.token for token in sequence.out] for sequence in sequences]
    assert all(0 < len(out) < WANTED for out in known), "all of them run"
    for number in list(ingress.live):
        ingress._recompute(number)
    nodes.hosts.pop(NodeId("n1"))  # its caches are gone
    nodes.plans.clear()
    ingress.commit(plan_of(2, stages([1], oracle.count, ["n0", "n2"]), fast, oracle.count))
    ingress.run(20)
    ingress.commit(plan_of(3, stages([3], oracle.count, ["n0", "n2"]), fast, oracle.count))  # and crosses after it
    ingress.run()
    for prompt, sequence, out in zip(oracle.prompts, sequences, known, strict=False):
        expected = oracle.answer(prompt + out, WANTED - len(out), SAMPLINGS[0])
        assert [Choice(t.token, t.logprob, t.top) for t in sequence.out[len(out) :]] == expected
        assert [token.index for token in sequence.out] == list(range(WANTED))
    assert ingress.crossed > 0


@pytest.mark.parametrize("nodes_of", [["n0", "n1"], ["n0", "n1", "n0"]])
def test_the_next_turn_begins_behind_what_was_kept_and_answers_as_if_nothing_was(
    oracle: Oracle, nodes_of: list[str]
) -> None:
    nodes = Nodes(oracle.engines, SETTINGS)
    ingress = Ingress(nodes)
    cuts = [2, 4][: len(nodes_of) - 1]
    ingress.commit(plan_of(1, stages(cuts, oracle.count, nodes_of), SETTINGS, oracle.count))
    history = list(oracle.prompts[5])
    kept = []
    for turn in range(3):
        sequence = ingress.ask(list(history), 8, SAMPLINGS[turn % 2])
        ingress.run()
        kept.append(sequence.cached)
        assert [Choice(t.token, t.logprob, t.top) for t in sequence.out] == oracle.answer(
            history, 8, SAMPLINGS[turn % 2]
        )
        history += [token.token for token in sequence.out] + oracle.prompts[1]
    assert kept == [0, 32, 48], "whole chunks of the prompt before, in a longer slot each time"
    assert ingress.recomputed == 0


def test_what_was_kept_makes_room_for_new_sequences(oracle: Oracle) -> None:
    ingress = Ingress(Nodes(oracle.engines, SETTINGS.model_copy(update={"max_sequences": 4})))
    ingress.commit(plan_of(1, stages([2], oracle.count, ["n0", "n1"]), ingress.nodes.settings, oracle.count))
    for _ in range(2):
        sequences = oracle.ask_all(ingress)
        ingress.run()
        oracle.check(sequences)
    assert ingress.recomputed == 0
