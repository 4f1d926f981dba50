"""The HTTP side: one app, one adapter per protocol. Adapters do no input or output."""
