"""Bodies of requests (pydantic, validated) and of responses (msgspec, encoded fast); small endpoints have their own."""
