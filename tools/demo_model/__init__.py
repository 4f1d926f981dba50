"""Makes headrace's demo model from nothing; `python tools/demo_model/make.py` does all of it."""
