"""PURE: when to act - keep, redistribute or re-split (mathematics.md A4).

Hard triggers go first and weigh nothing. Then, if no plan at all could repay a move, the answer is certain
whatever the candidates are. Only then a policy weighs the candidates against each other. All policies share
these two steps, the margin, the migration budget and the choice of the cheapest class, so that what is compared
is the rule alone.

The state of a policy is a value. Costs are in Phi, moves and what they are compared with in Phi x seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Protocol

from orchestrator.decision import Action, Decision, Observation, Option, RunnerUp

PLANNING_PERIOD_S = 5.0
"""How often a plan that serves is weighed against others."""
ELAPSED_MAX_S = 2 * PLANNING_PERIOD_S
"""One look is evidence about this much time at most: nobody looked while a plan was rolled out."""
MARGIN = 0.15
"""A candidate counts as better only by what it saves beyond this share of the current Phi. Of 20 % noise a second
8 % are left on a node (`beliefs.SMOOTHING_S`) and 11 % on the difference of two: noise alone never adds up."""
HORIZON_S = 120.0
"""H: how long a state of affairs is trusted to last when a move has to pay back."""
BUDGET_BYTES_PER_S = 16 * 2**20
"""What migrations may take for good: an eighth of Gigabit Ethernet."""
BUDGET_SCALE_BYTES = 256 * 2**20
"""V: this much overdrawn, or as much as the whole model, a move costs twice its price."""
MOVE_BYTES_MIN = 256 * 2**20
"""What every move is charged at least, so that moves that carry nothing are bounded too."""
BURN_MAX = 2.0
"""An error budget that burns this many times too fast, in both windows, is a hard trigger."""
BROKEN, KEPT = 0.2, 1 / 3
"""A plan under which more than this share of the requests is predicted to miss what is promised is left at once for one
under which at most that part of them does,"""
SOONER = 1.5
"""and which takes that much less time: noise leaves 11 % on the difference of two that are alike."""
URGENT_S = 60.0
SOON_S = 20.0
"""Within this much of it a plan has to be ready to go before one that helps less and is there at once."""
UNSERVED = 4.0
"""What a plan that cannot stay costs at least, in Phi of the best there is."""
EPSILON = 1e-9
STAYING_COST_MORE = "by now staying has cost more than going there and back would"


@dataclass(frozen=True)
class TriggerState:
    """What a policy remembers between two looks."""

    at: datetime | None = None
    here: str | None = None
    """The plan that was current."""
    work: Mapping[str, float] = field(default_factory=dict)
    """w of each candidate for the work function; R for the round-trip regret; a mean Phi for the threshold rule."""
    debt_bytes: float = 0.0
    """Y: bytes moved beyond the budget."""
    moved_at: datetime | None = None


class Policy(Protocol):
    """A rule that decides. Another one, a learned one say, is compared on the same footing by being one of these."""

    def __call__(
        self, state: TriggerState, observation: Observation, now: datetime
    ) -> tuple[TriggerState, Decision]: ...


@dataclass(frozen=True)
class Verdict:
    """What a rule says: its new memory, who fires, and how to say why or why not."""

    work: Mapping[str, float]
    fired: tuple[Option, ...]
    """The best first."""
    why_now: str


class Rule(Protocol):
    """What is a policy's own; `scale` is what moves cost more for the budget that is overdrawn."""

    def __call__(self, state: TriggerState, seen: Observation, elapsed_s: float, scale: float) -> Verdict: ...


@dataclass(frozen=True)
class WorkFunction:
    """The work-function algorithm over the candidates.

    w_t(x) = min_y [w_{t-1}(y) + Phi_t(y) + D(y,x)]; a candidate x with w_t(x) = w_{t-1}(x) + Phi_t(x) fires once
    w_t(x) + D(s,x) is no more than staying has cost. One that is new enters with min_y [w(y) + D(y,x)], one that
    vanished leaves. For K plans that stay, a D that is a metric and no margin it is (2K-1)-competitive against the best
    sequence of them; with the margin, which is charged from where one is, no ratio is claimed (mathematics.md A4).
    """

    margin: float = MARGIN
    horizon_s: float = HORIZON_S

    def __call__(self, state: TriggerState, observation: Observation, now: datetime) -> tuple[TriggerState, Decision]:
        return decided(state, observation, now, self.horizon_s, self.margin, self._rule)

    def _rule(self, state: TriggerState, seen: Observation, elapsed_s: float, scale: float) -> Verdict:
        here = seen.current
        before = _entered(state.work, seen, scale)
        paid = {x.key: before[x.key] + elapsed_s * _charged(x, here, self.margin) for x in seen.options}
        work = {x.key: min(paid[y.key] + scale * seen.distance(y, x) for y in seen.options) for x in seen.options}
        least = min(work.values())
        reached = {
            x.key: work[x.key] + scale * seen.distance(here, x)
            for x in seen.options
            if x.key != here.key and work[x.key] >= paid[x.key] - EPSILON and _better(x, here, self.margin)
        }
        fired = sorted(
            (x for x in seen.options if x.key in reached and reached[x.key] <= paid[here.key] + EPSILON),
            key=lambda x: (reached[x.key], x.phi, x.key),
        )
        return Verdict({key: value - least for key, value in work.items()}, tuple(fired), STAYING_COST_MORE)


@dataclass(frozen=True)
class RoundTripRegret:
    """R <- max(0, R + Phi(c) - Phi(c')); fires once R pays for the way there and back."""

    margin: float = MARGIN
    horizon_s: float = HORIZON_S

    def __call__(self, state: TriggerState, observation: Observation, now: datetime) -> tuple[TriggerState, Decision]:
        return decided(state, observation, now, self.horizon_s, self.margin, self._rule)

    def _rule(self, state: TriggerState, seen: Observation, elapsed_s: float, scale: float) -> Verdict:
        here = seen.current
        before = state.work if state.here == here.key else {}
        regret = {
            x.key: max(0.0, before.get(x.key, 0.0) + elapsed_s * (here.phi - _charged(x, here, self.margin)))
            for x in seen.options[1:]
        }
        paying = [
            x
            for x in seen.options[1:]
            if regret[x.key] + EPSILON >= 2 * scale * seen.distance(here, x) and _better(x, here, self.margin)
        ]
        fired = sorted(paying, key=lambda x: (2 * scale * seen.distance(here, x) - regret[x.key], x.phi, x.key))
        return Verdict({} if fired else regret, tuple(fired), STAYING_COST_MORE)


@dataclass(frozen=True)
class AlwaysArgmin:
    """Moves whenever a candidate looks better: the literal rule of arXiv 2504.03668, for comparison."""

    def __call__(self, state: TriggerState, observation: Observation, now: datetime) -> tuple[TriggerState, Decision]:
        return decided(state, observation, now, None, 0.0, self._rule)

    def _rule(self, state: TriggerState, seen: Observation, elapsed_s: float, scale: float) -> Verdict:
        better = sorted((x for x in seen.options[1:] if x.phi < seen.current.phi), key=lambda x: (x.phi, x.key))
        return Verdict({}, tuple(better[:1]), "it looks better")


@dataclass(frozen=True)
class EwmaThreshold:
    """Moves when a smoothed Phi is better by a share and the last move is a while ago: what many systems do."""

    weight: float = 0.3
    gain: float = 0.2
    cooldown: timedelta = timedelta(seconds=60)

    def __call__(self, state: TriggerState, observation: Observation, now: datetime) -> tuple[TriggerState, Decision]:
        if state.moved_at is not None and now - state.moved_at < self.cooldown:
            quiet = replace(self, gain=1.0)  # nothing is better by its whole cost
            return decided(state, observation, now, None, 0.0, quiet._rule)
        return decided(state, observation, now, None, 0.0, self._rule)

    def _rule(self, state: TriggerState, seen: Observation, elapsed_s: float, scale: float) -> Verdict:
        means = {
            x.key: state.work.get(x.key, x.phi) + self.weight * (x.phi - state.work.get(x.key, x.phi))
            for x in seen.options
        }
        wanted = (1 - self.gain) * means[seen.current.key]
        better = sorted((x for x in seen.options[1:] if means[x.key] < wanted), key=lambda x: (means[x.key], x.key))
        return Verdict(means, tuple(better[:1]), f"its mean is better by more than {self.gain:.0%}")


DEFAULT_POLICY: Policy = WorkFunction()


def awaited(state: TriggerState, seen: Observation, now: datetime) -> tuple[TriggerState, Decision]:
    """The decision while another plan is being prepared: none, and what was gathered for one stands."""
    return replace(state, at=now, here=seen.current.key), _kept(seen, "another plan is being prepared", now, 1.0)


def decided(
    state: TriggerState, seen: Observation, now: datetime, horizon_s: float | None, margin: float, rule: Rule
) -> tuple[TriggerState, Decision]:
    """The decision of a policy, by the steps that every policy shares and its own rule; `horizon_s` None leaves out the
    certificate that looks ahead."""
    elapsed_s = 0.0 if state.at is None else (now - state.at).total_seconds()
    # The budget is paid back by time alone, whether anybody looked or not.
    debt = max(0.0, state.debt_bytes - BUDGET_BYTES_PER_S * max(elapsed_s, 0.0))
    elapsed_s = min(max(elapsed_s, 0.0), ELAPSED_MAX_S)
    scale = 1 + debt / max(BUDGET_SCALE_BYTES, seen.model_bytes)
    after = replace(state, at=now, here=seen.current.key, debt_bytes=debt)
    hard = _hard_reason(seen)
    if hard is not None:
        return _hard(after, seen, hard, now)
    here = seen.current
    if seen.settling:
        return after, _kept(seen, "the plan before it still drains", now, scale)
    cheapest = min((scale * seen.distance(here, x) for x in seen.options[1:]), default=None)
    certificate = _certificate(seen, cheapest, horizon_s)
    if certificate is not None:
        return after, _kept(seen, certificate, now, scale, certified=True)
    verdict = rule(state, seen, elapsed_s, scale)
    after = replace(after, work=verdict.work)
    chosen = _cheapest_class(verdict.fired, here, margin)
    if chosen is None:
        return after, _kept(seen, _why_kept(seen, scale, margin), now, scale)
    saving, toll = here.phi - chosen.phi, scale * seen.distance(here, chosen)
    why = f"{verdict.why_now}; it saves {saving:.2f} a second and the move costs {toll:.2f}"
    return _moved(after, seen, chosen, now), _acted(seen, chosen, chosen.action_from(here), why, now, scale)


def _hard_reason(seen: Observation) -> str | None:
    if seen.hard is not None:
        return seen.hard
    if _breaks(seen):
        return f"{seen.current.missing:.0%} of the requests are predicted to miss what is promised"
    if seen.burn is not None and burns(seen.burn):
        short, long = seen.burn
        return f"the error budget burns {short:.1f} times too fast now and {long:.1f} times over the longer window"
    return None


def _hard(state: TriggerState, seen: Observation, reason: str, now: datetime) -> tuple[TriggerState, Decision]:
    """The best feasible candidate for the next `URGENT_S`, whatever the move costs, with what it takes until it is
    ready: a plan whose blocks are there is in force while one that is a little better would still be loading."""
    chosen = _best_meanwhile(seen)
    if chosen is None:
        return state, _kept(seen, f"{reason}, and no other plan is there that would help", now, 1.0)
    return _moved(state, seen, chosen, now), _acted(seen, chosen, Action.HARD, reason, now, 1.0)


def better_by_then(prepared: Option, seen: Observation) -> Option | None:
    """A plan that a hard trigger would choose now, where that is so much better over the next `URGENT_S` than
    `prepared` that it is not worth waiting for; None without a hard trigger, or such a plan."""
    if _hard_reason(seen) is None:
        return None
    best = _best_meanwhile(seen)
    if best is None or _wait_s(best, seen) > PLANNING_PERIOD_S:
        return None
    return best if SOONER * _meanwhile(best, seen) <= _meanwhile(prepared, seen) else None


def _best_meanwhile(seen: Observation) -> Option | None:
    able = [x for x in seen.options[1:] if not x.nodes & seen.unfit]
    if seen.hard is None:
        # Where no plan can keep the promise, noise must not send the deployment from one to the next.
        able = [x for x in able if _better(x, seen.current, MARGIN)]
        # One that keeps it goes first, for what load comes may be more than has come; but not where it takes long.
        able = [x for x in able if _keeps_more(x, seen.current) and _wait_s(x, seen) <= SOON_S] or able
    return min(able, key=lambda x: (_meanwhile(x, seen), x.phi, x.key), default=None)


def burns(burn: tuple[float, float] | None) -> bool:
    """Whether an error budget goes so fast, over a short and a long window, that something has to be done."""
    return burn is not None and min(burn) > BURN_MAX


def _breaks(seen: Observation) -> bool:
    """Whether the current plan breaks the promise so that it is to be left for another at once."""
    return seen.current.missing > BROKEN and any(_keeps_more(x, seen.current) for x in seen.options)


def _keeps_more(option: Option, here: Option) -> bool:
    return option.missing <= KEPT * here.missing and SOONER * option.of_promised <= here.of_promised


def _meanwhile(option: Option, seen: Observation) -> float:
    """Phi over the next `URGENT_S` if it is moved to now."""
    wait_s = min(_wait_s(option, seen), URGENT_S)
    until = seen.current.phi
    if seen.hard is not None:
        until = max(until, UNSERVED * min(x.phi for x in seen.options))
    return (wait_s * until + (URGENT_S - wait_s) * option.phi) / URGENT_S


def _wait_s(option: Option, seen: Observation) -> float:
    """Until it would be in force."""
    return seen.moves[seen.current.key, option.key].seconds


def _certificate(seen: Observation, cheapest: float | None, horizon_s: float | None) -> str | None:
    """Why no plan at all is worth moving to, if that is certain."""
    if seen.pinned:
        return "an operator placed it, and a placement never moves by itself"
    if cheapest is None:
        return "there is no other plan that fits"
    if horizon_s is None:
        return None
    most = max(0.0, seen.current.phi - seen.bound) * horizon_s
    if most >= cheapest:
        return None
    return (
        f"no plan can have less than Phi {seen.bound:.2f}, which saves {most:.2f} in {horizon_s:.0f} s at most, "
        f"and the cheapest move costs {cheapest:.2f}"
    )


def _charged(option: Option, here: Option, margin: float) -> float:
    """What a second on `option` counts: the margin makes staying the better of two equals."""
    return option.phi if option.key == here.key else option.phi + margin * here.phi


def _better(option: Option, here: Option, margin: float) -> bool:
    """Whether it is better now, not only was over time."""
    return _charged(option, here, margin) < here.phi


def _entered(work: Mapping[str, float], seen: Observation, scale: float) -> dict[str, float]:
    """w of every candidate; the ones that are new as the others make it."""
    old = [x for x in seen.options if x.key in work]
    if not old:
        return {x.key: scale * seen.distance(seen.current, x) for x in seen.options}
    return {
        x.key: work[x.key] if x.key in work else min(work[y.key] + scale * seen.distance(y, x) for y in old)
        for x in seen.options
    }


def _cheapest_class(fired: tuple[Option, ...], here: Option, margin: float) -> Option | None:
    """Of those that fire the best redistribution, unless a re-split is so much better that it would follow at once."""
    if not fired:
        return None
    spare = [x for x in fired if x.action_from(here) is Action.REDISTRIBUTE]
    return spare[0] if spare and spare[0].phi <= (1 + margin) * fired[0].phi else fired[0]


def _moved(state: TriggerState, seen: Observation, chosen: Option, now: datetime) -> TriggerState:
    charged = max(seen.moves[seen.current.key, chosen.key].bytes, MOVE_BYTES_MIN)
    return replace(state, debt_bytes=state.debt_bytes + charged, moved_at=now)


def _acted(seen: Observation, chosen: Option, action: Action, why: str, now: datetime, scale: float) -> Decision:
    return Decision(
        action=action,
        epoch=seen.epoch,
        at=now,
        current=seen.current,
        chosen=chosen,
        move=seen.moves[seen.current.key, chosen.key],
        runners_up=_runners_up(seen, chosen, scale),
        why_now=why,
        bound=seen.bound,
    )


def _kept(seen: Observation, why: str, now: datetime, scale: float, certified: bool = False) -> Decision:
    return Decision(
        action=Action.KEEP,
        epoch=seen.epoch,
        at=now,
        current=seen.current,
        chosen=seen.current,
        move=None,
        runners_up=_runners_up(seen, seen.current, scale),
        why_now=why,
        bound=seen.bound,
        certified=certified,
    )


def _why_kept(seen: Observation, scale: float, margin: float) -> str:
    here = seen.current
    best = min(seen.options[1:], key=lambda x: (x.phi, x.key))
    saving = here.phi - best.phi
    if saving <= 0:
        return "none of the other plans is better"
    if not _better(best, here, margin):
        return f"the best other plan saves {saving / here.phi:.0%}, within what measurements vary by ({margin:.0%})"
    toll = scale * seen.distance(here, best)
    return (
        f"the best other plan saves {saving:.2f} a second, not yet for long enough to pay {2 * toll:.2f} there and back"
    )


def _runners_up(seen: Observation, chosen: Option, scale: float) -> tuple[RunnerUp, ...]:
    others = sorted((x for x in seen.options if x.key != chosen.key), key=lambda x: (x.phi, x.key))
    return tuple(_runner_up(seen, x, chosen, scale) for x in others)


def _runner_up(seen: Observation, option: Option, chosen: Option, scale: float) -> RunnerUp:
    here = seen.current
    move = None if option.key == here.key else seen.moves[here.key, option.key]
    if option.nodes & seen.unfit:
        return RunnerUp(option, move, f"it needs {', '.join(sorted(option.nodes & seen.unfit))}")
    more = option.phi - chosen.phi
    if more > 0:
        return RunnerUp(option, move, f"worse by {more:.2f} ({more / chosen.phi:.0%})" if chosen.phi else "worse")
    if move is None:
        return RunnerUp(option, move, "it cannot stay")
    toll = scale * seen.distance(here, option)
    if chosen.key == here.key:
        return RunnerUp(option, move, f"saves {-more:.2f} a second, the move costs {toll:.2f}")
    return RunnerUp(option, move, f"no worse, but its move costs {toll:.2f}")
