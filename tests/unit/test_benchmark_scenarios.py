"""What `make benchmarks-doc` is told to run can be run."""

import tomllib

from benchmarks import contests
from benchmarks.scenarios import PARAMETERS, Parameters
from resplit.commands.simulate import seeds_of
from simulator.files import shipped, swept
from simulator.policies import named

PARAMETERS_OF_NOW = Parameters.model_validate(tomllib.loads(PARAMETERS.read_text()))


def test_every_comparison_is_of_a_scenario_that_ships_and_of_policies_that_there_are() -> None:
    names = []
    for each in PARAMETERS_OF_NOW.comparison:
        scenario = each.varied()
        names.append(scenario.name)
        assert all(named(policy).name == policy for policy in each.policies)
        assert {"static", "full"} <= set(each.policies)
        for _, varied in swept(scenario) if scenario.sweep else [({}, scenario)]:
            assert all(fault.at_s < varied.duration_s for fault in varied.faults), "every fault is met"
    assert len(set(names)) == len(names), "each has a file of its own"
    assert set(shipped()) - {"my-cluster", "small"} <= {*names, *contests.NAMES}


def test_what_was_tuned_on_is_not_reported_on() -> None:
    assert set(seeds_of(PARAMETERS_OF_NOW.seeds)) == set(seeds_of(contests.SEEDS)) == set(range(10, 40))
