"""`resplit models privacy` on real models: what it measures, what it says of it, and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from models import privacy
from models.keyring import stored_keys
from models.privacy import Asked, measure
from models.sealer import seal_model
from models.store import Store
from resplit.cli import app
from resplit.exits import Exit
from schemas.base import Digest
from schemas.errors import ErrorCode, ResplitError
from tests import model_zoo
from tests.model_split import Stages, corrupt

ROOT = Path(__file__).parents[2]
FEW = ("--sequences", "80", "--tokens", "16")
DECODERS = ["llama-fp32", "llama-int4", pytest.param("dynamo-fp32", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def store(zoo_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A copy, which tests may add to."""
    return Store(Path(shutil.copytree(zoo_store.root, tmp_path_factory.mktemp("privacy") / "store")))


def run(store: Store, *arguments: object) -> Result:
    return CliRunner().invoke(app, ["models", "privacy", *map(str, arguments), "--store", str(store.root)])


def probed(store: Store, *arguments: object) -> dict[str, Any]:
    ended = run(store, *arguments, "--json")
    assert ended.exit_code == Exit.OK, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def quietly(_what: str, _done: int, _total: int) -> None:
    """Nobody watches."""


def test_a_random_decoder_has_a_depth_for_each_cut_and_hides_nothing_behind_its_embedding(store: Store) -> None:
    found = probed(store, "llama", *FEW)
    curve = found["curve"]
    assert [depth["block"] for depth in curve["depths"]] == list(range(len(store.manifest("llama").blocks) - 1))
    assert [depth["shows_answer"] for depth in curve["depths"]] == [False] * (len(curve["depths"]) - 1) + [True]
    assert curve["depths"][0]["recovered"]["top1"] == 1
    assert (curve["model"], curve["drawn"], curve["calibration"], curve["test"]) == (
        store.resolve("llama"),
        "rank",
        70,
        10,
    )
    # Random layers bury the embedding under what they add, and still far from wholly.
    assert all(depth["recovered"]["low"] > depth["recovered"]["chance"] for depth in curve["depths"][:3])
    assert found["below"] == 0.1 and "keep_first" not in found


def test_a_sealed_model_is_probed_with_its_keys_and_is_the_same(store: Store, tmp_path: Path) -> None:
    sealed = Store(tmp_path / "sealed")
    seal_model(store, "llama", sealed)
    found, known = (probed(each, "llama", *FEW)["curve"] for each in (sealed, store))
    assert {**found, "model": None} == {**known, "model": None}
    (sealed.keys_folder / sealed.resolve("llama")).unlink()
    assert run(sealed, "llama", *FEW).exit_code == Exit.NOT_FOUND


def test_the_same_seed_measures_the_same(store: Store) -> None:
    first = probed(store, "llama", *FEW, "--seed", "3")
    assert probed(store, "llama", *FEW, "--seed", "3") == first
    assert probed(store, "llama", *FEW, "--seed", "4") != first


def test_the_table_has_a_row_for_each_cut_and_says_what_it_means(store: Store) -> None:
    shown = run(store, "llama", *FEW).stdout
    assert "more --sequences" not in shown
    assert "more --sequences" in run(store, "llama", "--sequences", "40", "--tokens", "8").stdout
    assert shown.count("█") >= 20 and "100.0 %" in shown
    assert "0  embedding" in shown and "head" not in shown.split("By this")[0].replace("the head", "")
    assert "recovery stays below 10.0 % at no cut" in shown
    assert "a stronger attack may recover more, never less" in shown
    assert "The answer is open at every cut" in " ".join(shown.split())


def test_whoever_has_the_blocks_before_a_cut_recovers_prompts_exactly_whatever_the_curve_says(store: Store) -> None:
    manifest = store.manifest("llama")
    keys = stored_keys(store, manifest.digest)
    runners = [privacy._Runner(store, manifest, block, keys, 1) for block in manifest.blocks[:-1]]

    def behind_the_last_cut(ids: privacy.Array) -> privacy.Array:
        value = ids
        for run in runners:
            value = run(value)
        return value

    prompt = [0, 17, 300, 5, 42, 17, 9]
    seen = behind_the_last_cut(np.array([prompt]))[0]
    found: list[int] = []
    for state in seen:
        tries = np.array([[*found, token] for token in range(model_zoo.VOCAB_SIZE)])
        found.append(int(np.abs(behind_the_last_cut(tries)[:, -1] - state).max(axis=1).argmin()))
    assert found == prompt


def test_a_trained_model_is_probed_with_a_text_of_what_it_is_asked(tmp_path: Path) -> None:
    adder = Store(Path(shutil.copytree(ROOT / "models" / "adder" / "store", tmp_path / "store")))
    rng = np.random.default_rng(0)
    sums = [f"{a}+{b}={str(a + b)[::-1]}|{a + b}" for a, b in rng.integers(100, 99999, (200, 2)).tolist()]
    file = tmp_path / "sums.txt"
    file.write_text("".join(sums))
    found = probed(adder, "adder", "--text", file, *FEW)
    assert found["curve"]["drawn"] == "text" and len(found["curve"]["text"]) == 64
    assert found["curve"]["depths"][0]["recovered"]["top1"] == 1


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_probed_is_what_crosses_in_a_split_run(name: str, zoo: Path, tmp_path: Path) -> None:
    store = Store(tmp_path)
    manifest = store.manifest(model_zoo.import_decoder(zoo, store, name))
    tokens = np.array([[0, 17, 300, 5, 42, 17, 9]])
    value: privacy.Array = tokens
    for block in manifest.blocks[:-1]:
        value = privacy._Runner(store, manifest, block, stored_keys(store, manifest.digest), 1)(value)
    boundary = manifest.blocks[-2].output
    assert boundary is not None
    stages = Stages(store, manifest, list(range(1, len(manifest.blocks))))
    given = {
        entry.tensor.name: privacy._as_declared(privacy._control(entry.role, 1, 7), entry.tensor).astype(
            entry.tensor.dtype
        )
        for entry in manifest.shared_inputs
    }
    given[manifest.inputs[0].name] = tokens
    for cache in (cache for block in manifest.blocks for cache in block.kv):
        length = 32 if cache.layout == "shared" else 0
        for past in (cache.past_key, cache.past_value):
            given[past] = np.zeros((1, cache.heads, length, cache.head_dim), cache.dtype)
    assert np.array_equal(value, stages.run(given)[boundary.name])


@pytest.mark.parametrize(
    ("arguments", "ends", "says"),
    [
        (["nobody"], Exit.NOT_FOUND, "no model 'nobody' here"),
        (["embedder"], Exit.REFUSED, "embedder is of kind embedder; only decoders are probed"),
        (["cnn"], Exit.REFUSED, "cnn is of kind tensor; only decoders are probed"),
        (["llama", "--sequences", "39"], Exit.USAGE, "sequences is 39; ask for 40 to 4096"),
        (["llama", "--tokens", "3"], Exit.USAGE, "tokens is 3; ask for 4 to 512"),
        (["llama", "--seed", "-1"], Exit.USAGE, "seed is -1"),
        (["llama", "--below", "0"], Exit.USAGE, "below is 0"),
        (["llama", "--below", "nan"], Exit.USAGE, "below is nan"),
        (["llama", "--text", "/nowhere.txt"], Exit.USAGE, "/nowhere.txt cannot be read"),
        (["llama", "--text", "/"], Exit.USAGE, "/ cannot be read"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(store: Store, arguments: list[str], ends: Exit, says: str) -> None:
    ended = run(store, *arguments)
    assert ended.exit_code == ends
    assert ended.stdout == "" and ended.stderr.count("\n") == 1 and says in ended.stderr


def test_a_text_that_is_too_short_or_not_text_is_refused(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("the quick brown fox")
    ended = run(store, "llama", "--text", file)
    assert ended.exit_code == Exit.USAGE and "256 sequences of 32 need 8192; give a longer text" in ended.stderr
    file.write_bytes(b"the quick \xff fox")
    ended = run(store, "llama", "--text", file)
    assert ended.exit_code == Exit.USAGE and "is not UTF-8 (at byte 10)" in ended.stderr


def test_more_than_the_context_or_the_memory_holds_is_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch, zoo: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(privacy, "STATES_BYTES_MAX", 40 * 13 * 64 * 4 - 1)
    with pytest.raises(ResplitError, match="ask for 39 sequences or fewer") as caught:
        measure(store, "llama", Asked(40, 12, 0), 1, quietly)
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_REQUEST, "sequences")
    manifest = store.manifest("llama")
    assert manifest.text is not None
    short = manifest.model_copy(update={"text": manifest.text.model_copy(update={"context_length": 12})})
    with pytest.raises(ResplitError, match="ask for 11 or fewer") as caught:
        measure(store, store.save_manifest(short), Asked(40, 12, 0), 1, quietly)
    assert (caught.value.code, caught.value.field) == (ErrorCode.CONTEXT_EXCEEDED, "tokens")


def test_a_corrupt_weight_is_not_probed(store: Store, tmp_path: Path) -> None:
    copy = Store(Path(shutil.copytree(store.root, tmp_path / "store")))
    corrupt(copy.path(Digest(copy.manifest("llama").blocks[1].weights[0].digest)))
    assert "is corrupt" in run(copy, "llama", *FEW).stderr


def test_progress_reaches_its_end_and_never_goes_back(store: Store) -> None:
    seen: list[tuple[int, int]] = []
    measure(store, "llama", Asked(40, 4, 0), 1, lambda _what, done, total: seen.append((done, total)))
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))] and len(seen) % 40 == 0 and seen
