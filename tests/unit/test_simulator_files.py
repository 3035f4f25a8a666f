"""Scenarios: what is shipped loads, what is wrong is named with file, key, value and the nearest key there is."""

import re
import tomllib
from math import ceil, inf
from pathlib import Path

import pytest

from profiler.kv import kv_tokens
from schemas.base import Value
from schemas.deployment import Settings
from schemas.errors import ErrorCode, ResplitError
from schemas.slo import Slo
from schemas.toml import FILE_BYTES_MAX
from simulator import scenario as values
from simulator.files import at_chi, read, read_scenario, shipped, swept, with_value
from simulator.scenario import Scenario
from simulator.tiers.scenario import TwoTierScenario

SMALL = shipped()["small"].read_text()
TWO_TIERS = {"two-tier", "two-tier-bursts"}
NAMED = {
    "smart-city",
    "industry",
    "v2i",
    "unperturbed",
    "oscillation",
    "chi",
    "azure-sample",
    "small",
    "my-cluster",
}


def changed(tmp_path: Path, old: str, new: str) -> Path:
    """The small scenario with a passage replaced."""
    assert old in SMALL
    path = tmp_path / "mine.toml"
    path.write_text(SMALL.replace(old, new, 1))
    return path


def small() -> Scenario:
    return read_scenario(shipped()["small"])


def test_the_scenarios_of_the_benchmark_are_shipped() -> None:
    assert set(shipped()) == NAMED | TWO_TIERS | {"residency"}


@pytest.mark.parametrize("name", sorted(NAMED))
def test_every_shipped_scenario_loads_under_its_own_name(name: str) -> None:
    scenario = read_scenario(shipped()[name])
    assert scenario.name == name
    assert [one.name for _, one in swept(scenario)] == [name] * max(1, len(next(iter(scenario.sweep.values()), ())))


@pytest.mark.parametrize("name", sorted(NAMED - {"small"}))
def test_no_node_holds_a_whole_model_and_all_of_them_hold_it_twice(name: str) -> None:
    scenario = read_scenario(shipped()[name])
    model = scenario.model
    whole = model.layers * model.layer_bytes + 2 * model.ends_bytes
    edge = [(site, scenario.kinds[site.node]) for site in scenario.sites if scenario.kinds[site.node].tier == "edge"]
    assert max(kind.memory_bytes for _, kind in edge) < 1.5 * whole
    assert sum(site.nodes * kind.memory_bytes for site, kind in edge) > 2 * whole


@pytest.mark.parametrize("name", sorted(NAMED))
def test_every_class_meets_its_targets_alone_on_the_fastest_nodes_between_two_sites(name: str) -> None:
    scenario = read_scenario(shipped()[name])
    model, settings, link = scenario.model, scenario.served.settings, scenario.network.between
    kind = max((k for k in scenario.kinds.values() if k.tier == "edge"), key=lambda k: k.flops_per_s)
    room = 1.1 * model.layer_bytes + kv_tokens(settings) * model.layer_kv_bytes
    stages = ceil(model.blocks / (kind.memory_bytes // room))
    step_s = (model.layers * model.layer_bytes + model.ends_bytes) / kind.bytes_per_s
    token_s = model.layers * model.layer_flops / kind.flops_per_s
    sent_s = model.hidden * model.element_bytes * 8 / (link.mbit_per_s * 1e6)
    for one in scenario.workload.classes:
        # Each chunk of a prompt pays the latency of every hop; the last stage answers the first.
        chunks = ceil(one.prompt_tokens / settings.chunk_tokens)
        hops_s = (stages - 1) * (one.prompt_tokens * sent_s + chunks * link.rtt_ms / 2e3) + link.rtt_ms / 2e3
        ttft_ms = 1e3 * (one.prompt_tokens * token_s + model.head_flops / kind.flops_per_s + hops_s)
        tpot_ms = 1e3 * (step_s + (stages - 1) * sent_s) + stages * link.rtt_ms / 2
        assert ttft_ms < 0.75 * (one.slo.ttft_ms or inf)
        assert tpot_ms < 0.75 * (one.slo.tpot_ms or inf)
        assert ttft_ms + (one.output_tokens - 1) * tpot_ms < 0.75 * (one.slo.deadline_ms or inf)


def test_the_cities_are_as_the_specification_says() -> None:
    city, plant, road = (read_scenario(shipped()[name]) for name in ("smart-city", "industry", "v2i"))
    assert [site.nodes for site in city.sites] == [5] * 8 + [1]
    assert {(fault.at_s, fault.kind, fault.factor) for fault in city.faults} == {
        (90, "cloud-links", 20),
        (90, "kill", 1),
    }
    assert (city.workload.ramps[0].factor, city.workload.ramps[0].rise_s) == (4, 15)
    assert [(site.nodes, site.trusted) for site in plant.sites] == [(4, True), (4, False), (4, False)]
    assert (len(road.sites), road.workload.moves_s) == (60, (10, 40))


def test_the_example_for_operators_shows_every_key() -> None:
    text = shipped()["my-cluster"].read_text()
    kinds: list[type[Value]] = [Settings, Slo]
    kinds += [kind for kind in vars(values).values() if isinstance(kind, type) and issubclass(kind, Value)]
    fields = {field for kind in kinds for field in kind.model_fields}
    assert len(fields) > 80
    assert [field for field in sorted(fields) if not re.search(rf"\b{field}\b( =|\]|\.)", text)] == []


@pytest.mark.parametrize(
    ("old", "new", "key", "words"),
    [
        (
            "rate_per_s",
            "rate_per_sec",
            "workload.rate_per_sec",
            ["'rate_per_sec'", "did you mean 'rate_per_s'?", "got 4"],
        ),
        ("warmup_s", "warm_up_s", "warm_up_s", ["did you mean 'warmup_s'?"]),
        ('kind = "kill"', 'knd = "kill"', "faults.0.knd", ["did you mean 'kind'?"]),
        ("where = { nodes", "where = { nods", "faults.0.where.nods", ["did you mean 'nodes'?"]),
        ("flops_per_s", "flop_per_s", "kinds.box.flop_per_s", ["did you mean 'flops_per_s'?"]),
        ("spread = 0.3", "qqq = 1", "workload.classes.0.qqq", ["the keys here are name, share, prompt_tokens"]),
        ("rate_per_s = 4.0", "rate_per_s = -1.5", "workload.rate_per_s", ["greater than 0", "-1.5"]),
        ("rate_per_s = 4.0", "rate_per_s = nan", "workload.rate_per_s", ["nan"]),
        ("rate_per_s = 4.0", "rate_per_s = true", "workload.rate_per_s", ["True"]),
        ("nodes = 2", 'nodes = "2"', "sites.0.nodes", ["'2'"]),
        ("nodes = 2", "nodes = 2.5", "sites.0.nodes", ["2.5"]),
        ('node = "box"', 'node = "bux"', "sites.0.node", ["no kind 'bux'", "box"]),
        ('node = "box"', "", "sites.0.node", ["needed"]),
        ('name = "right"', 'name = "left"', "sites.1.name", ["'left'"]),
        ('name = "right"', 'name = "left-1"', "sites.1.name", ["'left-1'"]),
        ('"left-0"', '"left-7"', "faults.0.where.nodes", ["'left-7'"]),
        ('kind = "kill"', 'kind = "kil"', "faults.0.kind", ["'kil'"]),
        ('["left-0"]', '["left-0"], by_site = true', "faults.0.where.by_site", ["a share"]),
        ('kind = "kill"', 'kind = "cut"\nat_s = 1.0\n[[faults]]\nkind = "kill"', "faults.0.where", ["name some"]),
        ("warmup_s = 5.0", "warmup_s = 25.0", "warmup_s", ["25"]),
        ("context_tokens = 256", "context_tokens = 1024", "served.settings.context_tokens", ["1024", "512"]),
        ("prompt_tokens = 64", "prompt_tokens = 250", "workload.classes.0.prompt_tokens", ["250", "256"]),
        ("rate_per_s = 4.0", 'process = "periodic"', "workload.rate_per_s", ["'periodic' needs it"]),
        ("rate_per_s = 4.0", 'rate_per_s = 4.0\ntrace = "t.csv"', "workload.trace", ['process = "trace"']),
        ("rate_per_s = 4.0", "rate_per_s = 4.0\nmoves_s = [4, 3]", "workload.moves_s", ["[4.0, 3.0]"]),
        ("where = { nodes", "where = 3 #", "faults.0.where", ["a table is needed", "got 3"]),
        ('nodes = ["left-0"]', 'nodes = "left-0"', "faults.0.where.nodes", ["an array is needed", "'left-0'"]),
        ("[served]", '[served]\nsensitive = "end"', "served.sensitive", ["'ends' or 'all'", "'end'"]),
        ("drain_s", 'sweep = { "workload.rate" = [1.0] }\ndrain_s', "workload.rate", ["sweep", "'rate_per_s'", "1.0"]),
        ("drain_s", 'sweep = { "sites.9.nodes" = [1] }\ndrain_s', "sites.9.nodes", ["2 entries", "'9'"]),
        ("drain_s", "sweep = { chi = [0.0] }\ndrain_s", "chi", ["0.0"]),
    ],
)
def test_a_wrong_value_is_named_with_file_and_key(
    tmp_path: Path, old: str, new: str, key: str, words: list[str]
) -> None:
    path = changed(tmp_path, old, new)
    with pytest.raises(ResplitError) as caught:
        read_scenario(path)
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_REQUEST, key)
    for word in [key, *words]:
        assert word in caught.value.message
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "cannot read"),
        (b"name = ", "not valid TOML"),
        (b"\xff\xfe", "not valid TOML"),
        (b"a = " + b"[" * 5000, "not valid TOML"),
        (b"#" * (FILE_BYTES_MAX + 1), "no scenario"),
        (b"name = 2020-01-01", "mine.toml"),
        (b"", "mine.toml"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, data: bytes | None, words: str) -> None:
    path = tmp_path / "mine.toml"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ResplitError, match=words) as caught:
        read_scenario(path)
    assert caught.value.code is ErrorCode.INVALID_REQUEST


@pytest.mark.parametrize("name", sorted(TWO_TIERS))
def test_scenarios_of_two_tiers_load_under_their_own_names(name: str) -> None:
    found = read(shipped()[name])
    assert isinstance(found, TwoTierScenario)
    assert (found.name, found.bursts is not None) == (name, name.endswith("bursts"))


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("like = 'none.toml'", "like", ["none.toml"]),
        ("like = 3", "like", ["got 3"]),
        ("like = 'two-tier.toml'\nslot = 3", "slot", ["did you mean 'slots'"]),
        ("like = 'two-tier.toml'\nslots = 3", "slots", ["greater than or equal to 10", "3"]),
        ("like = 'two-tier.toml'\nbursts = { factor = 4.0, share = 0.5, slots = 3.0 }", "bursts.factor", ["below 1"]),
        (
            "like = 'two-tier.toml'\ntasks = [{ name = 'a', after = { hed = ['-'] } }]",
            "tasks.0.after",
            ["no service 'hed'"],
        ),
        (
            "like = 'two-tier.toml'\ntasks = [{ name = 'a', after = { filter = ['resize'] } }]",
            "tasks.0.after",
            ["'resize'", "does not use"],
        ),
    ],
)
def test_a_wrong_value_in_two_tiers_is_named_as_well(tmp_path: Path, text: str, key: str, words: list[str]) -> None:
    (tmp_path / "two-tier.toml").write_text(shipped()["two-tier"].read_text())
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ResplitError) as caught:
        read(path)
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_REQUEST, key)
    for word in ["mine.toml", *words]:
        assert word in caught.value.message


def test_a_missing_trace_is_named_and_a_present_one_found_from_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(shipped()["azure-sample"].read_text())
    with pytest.raises(ResplitError, match=r"mine\.toml: workload\.trace: .*azure-sample\.csv") as caught:
        read_scenario(path)
    assert caught.value.field == "workload.trace"
    (tmp_path / "azure-sample.csv").write_text("")
    assert read_scenario(path).workload.trace == str(tmp_path / "azure-sample.csv")


def test_a_value_is_changed_by_its_key_and_nothing_else_is() -> None:
    scenario = small()
    more = with_value(scenario, "sites.1.nodes", 5.0)
    assert [site.nodes for site in more.sites] == [2, 5]
    assert with_value(more, "sites.1.nodes", 2) == scenario
    assert with_value(scenario, "workload.classes.0.slo.tpot_ms", 50.0).workload.classes[0].slo.tpot_ms == 50
    bare = with_value(scenario, "served.slo", None)
    assert with_value(bare, "served.slo.ttft_ms", 500.0) == scenario


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("sites.1.nodes_count", 3, "did you mean 'nodes'"),
        ("kinds.bix.flops_per_s", 3, "did you mean 'box'"),
        ("workload.rate_per_s", -3, "greater than 0"),
        ("title.first", 3, "there is no key 'first'"),
        ("", 3, "there is no key ''"),
    ],
)
def test_a_key_or_value_that_does_not_fit_is_refused(key: str, value: float, words: str) -> None:
    with pytest.raises(ResplitError, match=words) as caught:
        with_value(small(), key, value)
    assert "'small'" in caught.value.message
    assert caught.value.field == key


def test_a_sweep_is_the_product_of_its_values() -> None:
    scenario = small().model_copy(update={"sweep": {"sites.0.nodes": (2.0, 3.0), "workload.rate_per_s": (1.0, 2.0)}})
    found = [(point, one.sites[0].nodes, one.workload.rate_per_s, one.sweep) for point, one in swept(scenario)]
    assert found == [({"sites.0.nodes": n, "workload.rate_per_s": r}, n, r, {}) for n in (2.0, 3.0) for r in (1.0, 2.0)]
    assert swept(small()) == [({}, small())]


def test_chi_is_the_time_between_changes_over_the_time_to_react() -> None:
    """Of four nodes one becomes slow every 30 s, so each of them every 120 s."""
    churn = at_chi(small(), 3.0, t_mig_s=4.0, detection_s=6.0).churn
    assert (churn.slow_every_s, churn.slow_s) == (80, 40)
    assert [one.churn.slow_every_s for _, one in swept(read_scenario(shipped()["chi"]))] == pytest.approx(
        [2.8, 8.4, 28, 84, 280, 840]
    )


def test_the_files_are_valid_for_others_who_read_toml() -> None:
    assert {tomllib.loads(path.read_text())["name"] for path in shipped().values()} == set(shipped())
