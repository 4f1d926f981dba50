"""Puts the parts together: processes, their start and end, the Engine, the server."""
