"""Measures what drafts gain that learn while they serve: acceptance, speed and memory."""
