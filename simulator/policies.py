"""Who decides: the full system, and what it is compared with, each under a name.

A contender differs from the full system in what it wants of the deployment, in the trigger's policy, or in what it does
ahead of need; everything else is the same code over the same world.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from orchestrator.trigger import DEFAULT_POLICY, Policy
from schemas.deployment import Deployment
from simulator.scenario import Scenario


def _as_is(wish: Deployment, scenario: Scenario) -> Deployment:
    return wish


@dataclass(frozen=True)
class Contender:
    """One way to decide."""

    name: str
    title: str
    policy: Callable[[], Policy] = field(default=lambda: DEFAULT_POLICY)
    wish: Callable[[Deployment, Scenario], Deployment] = _as_is
    stages_ahead: bool = True


FULL = Contender("full", "the full system")
