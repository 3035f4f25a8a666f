"""What a node remembers of each sequence that has a slot here: where it runs, how far, and who drives it."""

from dataclasses import dataclass, field

from schemas.frame import Adopt, Item, Sampling, SequenceId


@dataclass(slots=True)
class Progress:
    """Tokens of one sequence that one stage has run, and where its last step began."""

    tokens: int
    last: int


@dataclass(slots=True, eq=False)
class Record:
    """One sequence. It is of one epoch and one route at a time; a frame of any other is not run for it."""

    ingress: str
    seen_us: int
    epoch: int | None = None
    """None while its caches are still being copied here."""
    route: int = 0
    sampling: Sampling | None = None
    progress: dict[int, Progress] = field(default_factory=dict)
    """By stage number on its route."""
    adopting: Adopt | None = None
    """What it is to become once `arrived` allows."""
    arrived: dict[int, int] = field(default_factory=dict)
    """By block: the tokens whose caches were copied here for the epoch that adopts it."""
    moved_bytes: int = 0
    began_us: int = field(init=False)
    compute_us: int = 0
    """In calls that it took part in, here,"""
    calls: int = 0
    """and how many these were."""

    def __post_init__(self) -> None:
        self.began_us = self.seen_us

    @property
    def written(self) -> int:
        """No block on this node keeps anything of the sequence at this position or after it."""
        ran = max((progress.tokens for progress in self.progress.values()), default=0)
        return max(ran, max(self.arrived.values(), default=0))

    def is_on(self, epoch: int, route: int) -> bool:
        return self.epoch == epoch and self.route == route

    def advance(self, stage: int, item: Item, now_us: int) -> None:
        """`stage` has run the step of `item`."""
        progress = self.progress[stage]
        progress.last = item.position
        progress.tokens = item.position + item.count
        self.seen_us = now_us


Records = dict[SequenceId, Record]
