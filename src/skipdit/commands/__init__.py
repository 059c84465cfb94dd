"""The command lines of `skipdit`: what each takes. The rooms that they call are imported afterwards."""
