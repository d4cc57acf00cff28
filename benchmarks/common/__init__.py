"""What more than one benchmark needs; nothing here is a benchmark."""
