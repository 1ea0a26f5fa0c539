"""The official schema of SARIF 2.1.0; `data/README.md` says where it is from."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

_SCHEMA = Path(__file__).with_name("data") / "sarif-schema-2.1.0.json"


@functools.cache
def _validator() -> Any:
    import jsonschema

    schema = json.loads(_SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft4Validator.check_schema(schema)
    return jsonschema.Draft4Validator(schema)


def validate_sarif(log: object) -> None:
    """Raise `jsonschema.ValidationError` unless `log` is a SARIF 2.1.0 log."""
    _validator().validate(log)
