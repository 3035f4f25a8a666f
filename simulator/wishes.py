"""PURE: what the operators of a scenario want: one deployment, and which nodes they trust."""

from schemas.base import DeploymentName, NodeId
from schemas.deployment import Deployment
from simulator.model import Physics
from simulator.scenario import Scenario

DEPLOYMENT = DeploymentName("model")
"""Under which clients address it, in every world."""


def deployment_of(scenario: Scenario, physics: Physics) -> Deployment:
    """What the operator of a scenario wants."""
    served = scenario.served
    return Deployment(
        name=DEPLOYMENT,
        model=physics.digest,
        settings=served.settings,
        stages=served.stages,
        routes=served.routes,
        slo=served.slo,
        sensitive=served.sensitive,
        on_demand=served.on_demand,
    )


def trusted_of(scenario: Scenario) -> frozenset[NodeId]:
    """The nodes that operators trust; they say so of all before anything runs."""
    return frozenset(
        node
        for site in scenario.sites
        for node in site.members
        if (site.trusted if site.trusted is not None else scenario.kinds[site.node].trusted)
    )
