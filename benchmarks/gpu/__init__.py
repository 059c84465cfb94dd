"""What `bash scripts/gpu_check.sh` runs: correctness, speed and memory of everything on one GPU.

__main__     the command line, and which rows there are
plan         rows in order of importance, run for as long as the time lasts
record       gpu.json: the machine, and every result as soon as it is there
bench        one model in memory, its compiled forms, and a stopwatch
models       the four full-size models, and one call of each as a sampler makes it
baselines    the same weights in the code that others run
ahead        compiling in child processes while the tests run
probe, checks, latency, precision, end_to_end, training    what is measured
report       the table at the end, and docs/gpu.md
"""
