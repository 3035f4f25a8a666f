"""What a host that listens to everything it may hear learns of what others run, in what a real cluster said."""

import pytest

from bus.identity import ORCHESTRATOR
from bus.sealed_heartbeats import open_heartbeat, read_capacity, read_hosting
from schemas import subjects
from schemas.heartbeat import Heartbeat
from tests.security.recording import ADDER, N0, N1, Recording


@pytest.fixture(scope="module")
def heartbeats(recording: Recording) -> tuple[Heartbeat, ...]:
    """All of both agents, as the host at the edge hears them."""
    host, own = recording.identity(N1), {subjects.capacity(name) for name in (N0, N1)}
    return tuple(open_heartbeat(data, host) for subject, data in recording.said if subject in own)


def test_heartbeats_name_no_model_no_deployment_and_no_block(
    recording: Recording, heartbeats: tuple[Heartbeat, ...]
) -> None:
    leader = recording.identity(ORCHESTRATOR)
    said = [capacity for beat in heartbeats if (capacity := read_capacity(beat, leader)) is not None]
    assert len(said) == len(heartbeats)
    models = {stage.model for capacity in said for stage in capacity.stages}
    assert models, "something ran"
    for subject, data in recording.said:
        if subject.startswith(f"{subjects.ROOT}.capacity."):
            assert not any(secret.encode() in data for secret in (*models, '"stages"', '"block_times"', f'"{ADDER}"'))


def test_an_ingress_reads_what_its_hosts_run_and_a_host_nothing_of_the_ingress(
    recording: Recording, heartbeats: tuple[Heartbeat, ...]
) -> None:
    ingress, host = recording.identity(N0), recording.identity(N1)
    read = [hosting for beat in heartbeats if beat.node == N1 and (hosting := read_hosting(beat, ingress)) is not None]
    assert {block for hosting in read for stage in hosting.stages for block in stage.blocks} >= set(range(1, 9))
    assert all(read_hosting(beat, host) is None for beat in heartbeats if beat.node == N0)
