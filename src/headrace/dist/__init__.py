"""Who holds which part of a model (`topology`) and how the parts talk (`comm`)."""
