"""What all bodies have in common: strict types, null as absence, refusal by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from protocol.errors import InvalidRequestError


class Body(BaseModel):
    """Base of all bodies."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_means_absent(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


def refuse(
    fields: Mapping[str, Any], unsupported: Mapping[str, tuple[object, ...]], prefix: str = ""
) -> None:
    """Raise InvalidRequestError naming a field that asks for more than its neutral values."""
    for name, neutral in unsupported.items():
        if name in fields and not any(_same(fields[name], value) for value in neutral):
            raise InvalidRequestError(f"{prefix}{name} is not supported", f"{prefix}{name}")


def _same(left: object, right: object) -> bool:
    return type(left) is type(right) and left == right  # False is not 0 here
