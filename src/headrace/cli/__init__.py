"""The `headrace` command: one file per sub-command, imported when it is called."""
