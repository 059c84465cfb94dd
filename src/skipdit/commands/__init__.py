"""The command lines of `python -m skipdit`: what each takes. The rooms that they call are imported afterwards."""
