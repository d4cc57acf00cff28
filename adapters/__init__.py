"""Drafts that learn: online from live traffic (``alignment``), and offline before they serve (``training``)."""
