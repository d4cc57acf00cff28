"""The bigrams of each tenant, over the general graph."""

from __future__ import annotations

from collections import OrderedDict

from engine.vocab.bigram_graph import BigramGraph, TenantBigrams

MAX_TENANTS = 64
"""With a table of half a MiB each; the least recently used is forgotten beyond."""


class TenantGraphs:
    """One ``TenantBigrams`` a tenant, made at first use. Nothing passes between tenants.

    Args:
        general: for all of them; None to have the tenants' own only.
        max_tenants: remembered.
    """

    def __init__(self, general: BigramGraph | None, max_tenants: int = MAX_TENANTS) -> None:
        self._general, self._max_tenants = general, max_tenants
        self._graphs: OrderedDict[str, TenantBigrams] = OrderedDict()

    def of(self, tenant: str) -> TenantBigrams:
        """The tenant's."""
        if tenant not in self._graphs:
            self._graphs[tenant] = TenantBigrams(self._general)
            if len(self._graphs) > self._max_tenants:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(tenant)
        return self._graphs[tenant]
