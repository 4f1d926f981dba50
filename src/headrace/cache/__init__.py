"""KV pages and the prefixes kept in them. Works on integers and numpy; imports no torch."""
