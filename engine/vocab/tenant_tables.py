"""Which table of what followed what belongs to which tenant."""

from __future__ import annotations

from collections import OrderedDict

from kernels.native_sessions import Sessions


class TenantTables:
    """Gives each tenant a table at first use; the least recently used goes to another when there are no more.

    Args:
        sessions: whose the tables are.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._tables: OrderedDict[str, int] = OrderedDict()

    def of(self, tenant: str) -> int:
        """The tenant's; for this step only, as another may get it in a later one."""
        table = self._tables.get(tenant)
        if table is None:
            is_new = len(self._tables) < self._sessions.options.num_tenants
            table = len(self._tables) if is_new else self._tables.popitem(last=False)[1]
            self._sessions.clear_tenant(table)
            self._tables[tenant] = table
        self._tables.move_to_end(tenant)
        return table
