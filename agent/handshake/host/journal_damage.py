"""Finds the damaged rows of the agent's journal, and says what becomes of each."""

import sqlite3
from typing import Final

from agent.runtime.intact import Damage, as_bytes, seal

ENDED: Final = 1
"""Kind of a row that only answers late questions: damaged, it is emptied. Any other damaged row refuses the start."""
_FAR_LIFE: Final = 1 << 24
"""More lives than an agent ever has: follows a number of lives that was damaged."""

_EMPTY: Final = {
    "attempts": "kind = 1, body = x'', head = seal(migration_id, attempt, 1, number), sum = seal(migration_id, attempt, x'')",
    "migrations": "kind = 1, body = x'', head = seal(migration_id, 1, number), sum = seal(migration_id, x'')",
}
"""Assignments that empty a row, so that only its key is left."""


def damages_in(connection: sqlite3.Connection) -> list[Damage]:
    """Return every row whose checksums do not match."""
    damages = []
    for key, attempt, kind, number, body, head, total in connection.execute(
        "SELECT migration_id, attempt, kind, number, body, head, sum FROM attempts"
    ):
        which = f"the record of attempt {attempt} of migration {key}"
        sound = seal(key, attempt, kind, number) == head
        if not sound or seal(key, attempt, body) != total:
            damages.append(_damage("attempts", which, (key, attempt), ended=sound and kind == ENDED, sound=sound))
    for key, kind, number, body, head, total in connection.execute(
        "SELECT migration_id, kind, number, body, head, sum FROM migrations"
    ):
        sound = seal(key, kind, number) == head
        if not sound or seal(key, body) != total:
            which = f"migration {key}, which this agent drives,"
            damages.append(_damage("migrations", which, (key,), ended=sound and kind == ENDED, sound=sound))
    for *columns, total in connection.execute("SELECT domain_uuid, migration_id, attempt, sum FROM arrivals"):
        if seal(*columns) != total:
            remove = "DELETE FROM arrivals WHERE CAST(domain_uuid AS BLOB) = ?"
            damages.append(Damage(f"the arrival of guest {columns[0]}", True, remove, (as_bytes(columns[0]),)))
    for direction, key, body, total in connection.execute("SELECT direction, migration_id, body, sum FROM places"):
        if seal(direction, key, body) != total:
            which = f"the place of migration {key} in the queue for {direction} slots"
            remove = "DELETE FROM places WHERE CAST(direction AS BLOB) = ? AND CAST(migration_id AS BLOB) = ?"
            damages.append(Damage(which, False, remove, (as_bytes(direction), as_bytes(key))))
    for body, total in connection.execute("SELECT body, sum FROM settings"):
        if seal(body) != total:
            damages.append(Damage("the limits that were changed while this agent ran", True, "DELETE FROM settings", ()))
    for number, total in connection.execute("SELECT number, sum FROM lives"):
        if seal(number) != total:
            mend = "UPDATE lives SET number = ?1, sum = seal(?1)"
            damages.append(Damage("the number of this agent's lives", False, mend, (_FAR_LIFE,)))
    return damages


def _damage(table: str, which: str, key: tuple[str, int] | tuple[str], *, ended: bool, sound: bool) -> Damage:
    where = "WHERE CAST(migration_id AS BLOB) = ?" + (" AND attempt IS ?" if len(key) > 1 else "")
    mend = f"UPDATE {table} SET {_EMPTY[table]} {where}" if sound else f"DELETE FROM {table} {where}"
    return Damage(which, matters=not ended, mend=mend, parameters=(as_bytes(key[0]), *key[1:]))
