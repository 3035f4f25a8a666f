"""Reconfigurations under any history: the invariants of mathematics.md A5 that concern sequences, on real blocks.

I1 a frame of another epoch runs nothing, I3 no block is freed while a sequence needs it, I4 at most three live epochs,
I7 no node hands out more slots than it has, I8 every token is the uncut model's, I9 every request ends once. I2, I4
and I5 are held for plans in test_rollout.py, I6 in test_privacy.py. The model is the shipped adder: real sessions
and real caches.
"""

import functools
import random
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from models.reference import Reference
from models.store import Store
from profiler.kv import length_classes
from schemas.base import NodeId
from schemas.deployment import Settings, Stage
from schemas.frame import Sampling
from tests.nodes import Ingress, Nodes, Sequence, plan_of
from tests.route_harness import EngineCache, stages

CHUNK = 8
SETTINGS = Settings(chunk_tokens=CHUNK, context_tokens=128, max_sequences=8)
NODES = ["n0", "n1", "n2", "n3"]
PROMPTS = ["1+2=", "99999+1=", "348+1275=", "7+7737=", "12345+67890=", "5+5="]
WANTED_MAX = 30


@functools.cache
def model() -> tuple[EngineCache, Reference]:
    spec = find_spec("models.adder")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(tempfile.mkdtemp(prefix="resplit-properties-")) / "store"
    store = Store(Path(shutil.copytree(Path(spec.origin).parent / "store", folder)))
    digest = store.resolve("adder")
    return EngineCache(store, digest), Reference(store, digest, "cpu", 1)


@functools.cache
def answer(prompt: tuple[int, ...]) -> tuple[int, ...]:
    """What the uncut model says."""
    _, reference = model()
    context = SETTINGS.context_tokens
    return tuple(reference.generate(list(prompt), WANTED_MAX, CHUNK, context, stop_at_eos=False))


def cut(draw: random.Random, alive: list[str]) -> list[Stage]:
    """Any cut on nodes that live; the ends of a U may share one."""
    engines, _ = model()
    count = len(engines.manifest.blocks)
    size = draw.randint(1, len(alive))
    cuts = sorted(draw.sample(range(1, count), size - 1))
    nodes = draw.sample(alive, size)
    if size > 2 and draw.random() < 0.3:
        nodes[-1] = nodes[0]
    return stages(cuts, count, nodes)


class Reconfiguration(RuleBasedStateMachine):
    """Requests, cuts that move, frames that are lost or come twice, nodes that forget everything."""

    @initialize(seed=st.integers(0, 1 << 30), lossy=st.sampled_from([0.0, 0.01]))
    def begin(self, seed: int, lossy: float) -> None:
        self.draw = random.Random(seed)
        engines, _ = model()
        self.count = len(engines.manifest.blocks)
        self.nodes = Nodes(engines, SETTINGS, seed, lossy=lossy)
        self.ingress = Ingress(self.nodes)
        self.asked: list[Sequence] = []
        self.epoch = 0
        self.recut()

    @rule(prompt=st.sampled_from(PROMPTS), wanted=st.integers(1, WANTED_MAX))
    def ask(self, prompt: str, wanted: int) -> None:
        ids = [1 + ord(letter) % 14 for letter in prompt]
        self.asked.append(self.ingress.ask(ids, wanted, Sampling()))

    @rule(frames=st.integers(1, 60))
    def deliver(self, frames: int) -> None:
        self.ingress.run(frames)

    @precondition(lambda self: len(self.ingress.runs) < 3)
    @rule()
    def recut(self) -> None:
        self.epoch += 1
        self.ingress.commit(plan_of(self.epoch, cut(self.draw, NODES), SETTINGS, self.count))

    @rule()
    def retire(self) -> None:
        self.ingress.retire()

    @precondition(lambda self: self.epoch > 0)
    @rule(node=st.sampled_from(NODES[1:]))
    def forget(self, node: str) -> None:
        """A node's process is a new one: it has loaded its blocks again, and knows no sequence."""
        self.nodes.hosts.pop(NodeId(node), None)
        for plan in self.nodes.plans.values():
            for i, stage in enumerate(plan.routes[0].stages):
                if stage.node == node:
                    engine = self.nodes.engines.engine(stage.first, stage.last)
                    self.nodes.host(NodeId(node)).install({(plan.epoch, 0, i): engine})

    @invariant()
    def every_token_is_the_uncut_models(self) -> None:
        for sequence in getattr(self, "asked", ()):
            said = [token.token for token in sequence.out]
            assert said == list(answer(tuple(sequence.prompt))[: len(said)])
            assert len(said) <= sequence.wanted

    @invariant()
    def what_runs_has_its_blocks(self) -> None:
        if not hasattr(self, "ingress"):
            return
        for _, run in self.ingress.live.values():
            plan = run.plan
            for i, stage in enumerate(plan.routes[0].stages):
                assert i in self.nodes.host(stage.node).stages_on(plan.epoch, 0), "freed while a sequence needs it"

    @invariant()
    def no_node_hands_out_more_slots_than_it_has(self) -> None:
        rows = sum(count for _, count in length_classes(SETTINGS))
        for host in self.nodes.hosts.values() if hasattr(self, "nodes") else ():
            assert sum(host.sequences(epoch) for epoch in range(1, self.epoch + 1)) <= rows

    def teardown(self) -> None:
        if not hasattr(self, "ingress"):
            return
        self.nodes.lossless()
        self.ingress.run()
        for sequence in self.asked:
            assert [token.token for token in sequence.out] == list(answer(tuple(sequence.prompt))[: sequence.wanted])
        assert not self.ingress.live


def test_a_process_that_was_restarted_while_it_handed_over_brings_no_caches_of_its_own() -> None:
    """A story that was found once: blocks that stay on a node stay on its process, and nowhere else."""
    story = Reconfiguration()
    story.begin(seed=3288074, lossy=0.0)
    story.recut()
    story.recut()
    story.deliver(frames=52)
    story.retire()
    story.recut()
    story.retire()
    story.recut()
    for prompt, wanted in (("1+2=", 24), ("12345+67890=", 30), ("1+2=", 21), ("1+2=", 3)):
        story.ask(prompt=prompt, wanted=wanted)
    story.deliver(frames=36)
    story.recut()
    story.deliver(frames=44)
    story.forget(node="n3")
    story.recut()
    story.every_token_is_the_uncut_models()
    story.teardown()


TestReconfiguration = Reconfiguration.TestCase
TestReconfiguration.settings = settings(max_examples=8, stateful_step_count=25, deadline=None)


@pytest.mark.slow
class TestReconfigurationAtLength(TestReconfiguration):  # type: ignore[misc, valid-type]
    """The same with more stories."""

    settings = settings(max_examples=50, stateful_step_count=25, deadline=None)
