"""Updates by field mask: which fields of a message a request changes."""

from typing import Any, TypeVar

from google.protobuf.field_mask_pb2 import FieldMask

from agent.runtime.errors import invalid_field

M = TypeVar("M", bound=Any)
"""A message of protobuf."""


def masked(before: M, given: M, mask: FieldMask) -> M:
    """Return a copy of `before` with the masked fields of `given`: one that is unset or zero there is reset.

    Raises INVALID_FIELD for an empty mask, and for what is no field of the message (a field of a field is none)."""
    known = before.DESCRIPTOR.fields_by_name
    if not mask.paths:
        raise invalid_field("update_mask", f"names no field; known: {', '.join(known)}. Nothing was changed")
    after: M = type(before)()
    after.CopyFrom(before)
    for path in mask.paths:
        if path not in known:
            raise invalid_field("update_mask", f'"{path}" is no field of it; known: {", ".join(known)}. Nothing was changed')
        after.ClearField(path)
    changes = type(before)()
    changes.CopyFrom(given)
    for name in set(known) - set(mask.paths):
        changes.ClearField(name)
    after.MergeFrom(changes)
    return after
