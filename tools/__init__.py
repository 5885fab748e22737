"""Programs for developers, run from a checkout as `python -m tools.NAME`; no part of what is installed."""
