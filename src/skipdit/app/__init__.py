"""The web page: `skipdit app`."""
