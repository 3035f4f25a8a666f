"""PURE but for what it looks after: the services of pipelines, placed and steered step by step.

What is decided is in `orchestrator.pipelines`; here it is done, in the order in which it has to be, and told.
"""

from collections.abc import Callable
from datetime import datetime
from typing import Protocol

from bus.audit import Trail
from orchestrator.explaining import audited_services
from orchestrator.fold import DeploymentRemoved, Report, ServicesStand, Snapshot
from orchestrator.pipelines import (
    adopted,
    confirmed,
    is_to_be_placed,
    is_to_be_steered,
    orphans,
    pipelines,
    placed_anew,
    steered,
    unplaced,
    wanted,
)
from orchestrator.services.standing import Standing
from orchestrator.steps import Solve, Steps
from schemas.audit import AuditKind
from schemas.base import DeploymentName
from schemas.errors import ResplitError
from schemas.pipeline import Pipeline


class Minded(Protocol):
    """What it looks after."""

    snapshot: Snapshot
    audit: Trail
    now: Callable[[], datetime]

    def fold(self, report: Report, at: datetime) -> None: ...


class Caretaker:
    """Keeps the deployments of services in line with their pipelines, with the nodes there are and with what comes."""

    def __init__(self, mind: Minded) -> None:
        self._mind = mind

    def look_after(self) -> Steps:
        """Place and steer the services of pipelines: what deployments there are is asked after that."""
        for name in orphans(self._mind.snapshot):
            self._mind.fold(DeploymentRemoved(name), self._mind.now())
        for name, pipeline in pipelines(self._mind.snapshot).items():
            if name not in self._mind.snapshot.pipelines:
                found = adopted(self._mind.snapshot, name, pipeline, self._mind.now())
                if found is not None:
                    self._let_stand(name, pipeline, found)
            if (found := confirmed(self._mind.snapshot, name, pipeline)) is not None:
                self._let_stand(name, pipeline, found)
            if is_to_be_placed(self._mind.snapshot, name, pipeline, self._mind.now()):
                yield from self._place_services(name, pipeline)
            elif is_to_be_steered(self._mind.snapshot, name, self._mind.now()):
                yield from self._steer_services(name, pipeline)

    def _steer_services(self, name: DeploymentName, pipeline: Pipeline) -> Steps:
        snapshot, now = self._mind.snapshot, self._mind.now()
        solved = yield Solve(lambda: steered(snapshot, name, pipeline, now))
        assert isinstance(solved, Standing), "whoever performs a `Solve` sends its answer, or throws its error"
        self._let_stand_if_known(name, pipeline, solved)

    def _place_services(self, name: DeploymentName, pipeline: Pipeline) -> Steps:
        snapshot, now = self._mind.snapshot, self._mind.now()
        try:
            solved = yield Solve(lambda: placed_anew(snapshot, name, pipeline, now))
        except ResplitError as error:
            before = self._mind.snapshot.pipelines.get(name)
            if before is None or before.error != error.body:  # said once, however often it is tried
                self._mind.audit.record(
                    AuditKind.DEPLOYMENT_INFEASIBLE,
                    "the services of a pipeline cannot be placed",
                    deployment=name,
                    code=error.code.value,
                    why=error.message,
                )
            found = unplaced(self._mind.snapshot, name, pipeline, error, self._mind.now())
        else:
            assert isinstance(solved, Standing), "whoever performs a `Solve` sends its answer, or throws its error"
            found = solved
        self._let_stand_if_known(name, pipeline, found)

    def _let_stand_if_known(self, name: DeploymentName, pipeline: Pipeline, found: Standing) -> None:
        # It may have been removed meanwhile, or another deployed under its name.
        if pipelines(self._mind.snapshot).get(name) == pipeline:
            self._let_stand(name, pipeline, found)

    def _let_stand(self, name: DeploymentName, pipeline: Pipeline, found: Standing) -> None:
        before = self._mind.snapshot.pipelines.get(name)
        deployments = wanted(self._mind.snapshot, name, pipeline, found)
        self._mind.fold(ServicesStand(name, found, deployments), self._mind.now())
        if before is not None and before.placed == found.placed and before.why == found.why:
            return
        steered_only = before is not None and before.basis == found.basis
        kind = AuditKind.SERVICES_STEERED if steered_only else AuditKind.SERVICES_PLACED
        self._mind.audit.record(
            kind,
            "light services were steered" if steered_only else "the services of a pipeline were placed",
            deployment=name,
            epoch=None,
            request=None,
            then=None,
            **audited_services(found),
        )
