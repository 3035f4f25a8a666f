"""Who goes on with what a life of an ingress began to take over."""

import pytest

from agent.heirs import goes_on
from schemas.base import LifeId

A, B, C = LifeId("a-boot-0"), LifeId("b-boot-0"), LifeId("c-boot-0")


@pytest.mark.parametrize(
    ("fences", "heir"),
    [
        ({A: B}, B),
        ({A: B, B: None}, B),
        ({A: B, B: C}, C),
        ({A: B, B: C, C: None}, C),
        ({A: B, B: A}, None),
        ({A: B, B: C, C: B}, None),
        ({A: B, B: C, C: A}, None),
    ],
)
def test_what_a_life_began_is_its_heir_s_and_nobody_s_where_each_was_fenced(
    fences: dict[LifeId, LifeId | None], heir: LifeId | None
) -> None:
    assert goes_on(fences[A], fences) == heir


def test_what_nobody_began_nobody_goes_on_with() -> None:
    assert goes_on(None, {A: None}) is None
