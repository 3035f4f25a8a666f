"""Where a candidate comes from is a closed list twice: as it is decided, and as it travels."""

from typing import get_args

from orchestrator.decision import Origin
from schemas.control import CandidateReport


def test_every_origin_of_a_candidate_can_be_told() -> None:
    assert set(get_args(CandidateReport.model_fields["origin"].annotation)) == {origin.value for origin in Origin}
