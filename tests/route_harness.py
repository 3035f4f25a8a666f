"""A route in one process: the production driver, stages, caches and frames, with the network left out.

Every frame is packed and unpacked between stages, so what is tested is what travels.
"""

import itertools
from collections import deque
from dataclasses import dataclass, field

from agent.batching import Work, next_batch
from agent.driver import Prompt, RouteDriver
from agent.engine import Engine, Segment
from agent.kv import KvPool
from agent.memory import Device
from agent.probe import probe
from agent.stage import Queued, StageHost
from models.merge import merge
from models.session import open_session, verified_graph
from models.store import Store
from profiler.kv import length_classes
from schemas.base import Digest, NodeId
from schemas.deployment import Settings, Stage
from schemas.frame import Activation, Failure, Result, Sampling, SequenceId, Token
from schemas.framing import pack, unpack
from schemas.manifest import Manifest

MODEL = Digest("0" * 64)
"""Whatever the engines run: stages only pass it on."""


class EngineCache:
    """Engines by block range, so that enumerating cuts does not load a block twice."""

    def __init__(
        self, store: Store, model: Digest, threads: int = 1, *, fuse: bool = False, device: Device = "cpu"
    ) -> None:
        """`fuse`: neighbouring blocks in one session, the head apart; else, as agents do it, a session each."""
        self.store = store
        self.manifest: Manifest = store.manifest(model)
        self._threads = threads
        self._fuse = fuse
        self.device = device
        self._engines: dict[tuple[int, int], Engine] = {}

    def engine(self, first: int, last: int) -> Engine:
        if (first, last) not in self._engines:
            blocks = self.manifest.blocks[first : last + 1]
            body = [block for block in blocks if not self._fuse or block.role == "head"]
            fused = [block for block in blocks if block not in body]
            groups = [group for group in (fused, *([block] for block in body)) if group]
            segments = []
            for group in groups:
                graph = merge([verified_graph(self.store, block) for block in group])
                session = open_session(graph, self.store.blobs_folder, self.device, self._threads)
                segments.append(Segment(tuple(group), session))
            engine = self._engines[first, last] = Engine(self.manifest, segments, self.device)
            engine.rows_min = probe(engine).rows_min
        return self._engines[first, last]


@dataclass
class Output:
    """What one sequence produced."""

    tokens: list[int] = field(default_factory=list)
    detailed: list[Token] = field(default_factory=list)


class Route:
    """Stages on named nodes; a node named twice hosts both of its stages over one cache."""

    def __init__(self, engines: EngineCache, stages: list[Stage], settings: Settings) -> None:
        self.stages = stages
        self.settings = settings
        self.hosts = {
            stage.node: StageHost(stage.node, MODEL, KvPool(engines.device, length_classes(settings)), lambda _: None)
            for stage in stages
        }
        for i, stage in enumerate(stages):
            self.hosts[stage.node].install({(1, 0, i): engines.engine(stage.first, stage.last)})
        self.driver = RouteDriver("d", 1, 0, "n0", settings.chunk_tokens, settings.pipeline_depth)
        self.frames = 0

    def generate(
        self, prompts: list[list[int]], max_tokens: int | list[int], sampling: Sampling | None = None
    ) -> list[Output]:
        """Run all prompts at once; each to its number of tokens."""
        wanted = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
        outputs = [Output() for _ in prompts]
        classes = [tokens for tokens, _ in length_classes(self.settings)]
        for i, prompt in enumerate(prompts):
            capacity = next(c for c in classes if c >= len(prompt) + wanted[i])
            self.driver.admit(Prompt(i, tuple(prompt), capacity, sampling or Sampling()))
        clock = itertools.count()
        waiting: deque[Activation] = deque(self.driver.frames(next(clock)))
        last_kind: str | None = None
        while waiting:
            stage = waiting[0].stage
            host = self.hosts[self.stages[stage].node]
            here = [frame for frame in waiting if frame.stage == stage]
            chosen = next_batch([Work(host.engine_key(f), f.kind, len(f.items)) for f in here], last_kind, 256)
            batch = [here[i] for i in chosen]
            last_kind = batch[0].kind
            for frame in batch:
                waiting.remove(frame)
            for out in host.run([Queued(frame, 0) for frame in batch]):
                self.frames += 1
                travelled = unpack(b"".join(bytes(piece) for piece in pack(out)))
                match travelled:
                    case Activation():
                        waiting.append(travelled)
                    case Result():
                        self._take(travelled, outputs, wanted, next(clock))
                        waiting.extend(self.driver.frames(next(clock)))
                    case Failure():
                        raise AssertionError(travelled.message)
                    case _:
                        raise AssertionError(travelled)
        return outputs

    def _take(self, result: Result, outputs: list[Output], wanted: list[int], now: float) -> None:
        for token in (answered.token for answered in self.driver.take(result, now)):
            if token is None:
                continue
            output = outputs[token.sequence]
            output.tokens.append(token.token)
            output.detailed.append(token)
            if len(output.tokens) < wanted[token.sequence]:
                self.driver.go_on(token.sequence, token.token)
            else:
                self.end(token.sequence)

    def end(self, sequence: SequenceId) -> None:
        self.driver.end([sequence])
        for host in self.hosts.values():
            host.close([sequence])


def stages(cuts: list[int], count: int, nodes: list[str] | None = None) -> list[Stage]:
    """Stages that begin at block 0 and at each of `cuts`, on nodes n0, n1, ... or those named."""
    bounds = [0, *cuts, count]
    names = nodes or [f"n{i}" for i in range(len(bounds) - 1)]
    return [
        Stage(node=NodeId(n), first=a, last=b - 1) for n, (a, b) in zip(names, itertools.pairwise(bounds), strict=True)
    ]
