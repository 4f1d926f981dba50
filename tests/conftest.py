"""Every run draws the same examples: a test that fails by chance tells nothing.

`--hypothesis-profile=search` draws new ones, for a developer who looks for what is still wrong.
"""

from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.register_profile("search", deadline=None)
settings.load_profile("fixed")
