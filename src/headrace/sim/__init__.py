"""The real scheduler without a device: recordings of servers are run again."""
