"""What a session's draft vocabulary is made of: its tail, its statistics, its prior, its snapshot. No torch."""
