"""A model of many replicas behind a ring, checked against real ones: docs/fleet-simulation.md."""
