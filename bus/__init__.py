"""Floor 1: how a process stands on the bus: connection, keys, streams, audit trail, files by hash."""
