"""What never happens to a store, whatever is put into it and removed from it."""

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from models.store import Store
from tests.unit.test_models_store import manifest

NAMES = st.sampled_from(["a", "b", "c"])
WEIGHTS = st.sets(st.binary(min_size=1, max_size=2).map(lambda data: b"weight" + data), max_size=4)


class NamedModelsStayWhole(RuleBasedStateMachine):
    """Models with overlapping weights come and go; those that are named can always be verified."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self._store = Store(Path(self._folder.name))
        self._named: set[str] = set()

    @rule(name=NAMES, weights=WEIGHTS)
    def import_one(self, name: str, weights: set[bytes]) -> None:
        refs = [self._store.put(data) for data in sorted(weights)]
        self._store.name(name, self._store.save_manifest(manifest(name, self._store.put(b"graph"), *refs)))
        self._named.add(name)

    @rule(name=NAMES)
    def remove_one(self, name: str) -> None:
        if name in self._named:
            before = sum(path.stat().st_size for path in self._store.blobs_folder.iterdir())
            freed = self._store.remove(name)
            after = sum(path.stat().st_size for path in self._store.blobs_folder.iterdir())
            assert before - after == freed
            self._named.discard(name)

    @invariant()
    def every_named_model_verifies(self) -> None:
        assert self._store.names().keys() == self._named
        for name in self._named:
            self._store.verify_model(name)

    def teardown(self) -> None:
        self._folder.cleanup()


TestNamedModelsStayWhole = NamedModelsStayWhole.TestCase
TestNamedModelsStayWhole.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
