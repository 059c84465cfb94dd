"""The paper's analyses of a model's features (Skip-DiT, arXiv 2411.17616), on any of the backbones.

    skipdit analyze perturb --config configs/class-to-image/demo.yaml

`trace` records what a model computes while its task's sampler samples, `measure` takes numbers from that, `plot` draws
them.
"""
