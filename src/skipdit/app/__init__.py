"""The web page: `python -m skipdit app`."""
