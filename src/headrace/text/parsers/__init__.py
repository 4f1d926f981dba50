"""Incremental parsers of what a model writes: reasoning, tool calls, content.

Pure functions of the text: they know no request, no protocol and no token.
"""
