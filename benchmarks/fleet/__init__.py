"""Many replicas behind a router that people already run, while replicas and Redis are hurt."""
