"""docs/schemas is what the types say."""

import json
from pathlib import Path

from schemas.export import DIALECT, documents, write

SHIPPED = Path(__file__).parents[2] / "docs" / "schemas"


def test_the_shipped_schemas_are_those_of_the_types() -> None:
    shipped = {path.name: path.read_text() for path in SHIPPED.iterdir()}
    assert shipped == documents(), "docs/schemas is stale: make schemas"


def test_writing_twice_changes_nothing(tmp_path: Path) -> None:
    first = {path: path.read_bytes() for path in write(tmp_path / "new")}
    assert {path: path.read_bytes() for path in write(tmp_path / "new")} == first


def test_a_schema_names_its_dialect_and_refuses_unknown_fields() -> None:
    schema = json.loads(documents()["text_request.json"])
    assert (schema["$schema"], schema["additionalProperties"]) == (DIALECT, False)
    assert schema["properties"]["max_tokens"]["default"] == 256
