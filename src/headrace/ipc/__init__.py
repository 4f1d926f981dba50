"""Typed channels between the processes of one server."""
