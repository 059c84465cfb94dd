"""The same images with several caches: a table of speed and fidelity, and a picture to look at.

    python class-to-image/compare.py --config configs/class-to-image/demo.yaml

Rows: the uncached run, reuse (order 0), forecast (order 1), and simply fewer steps at the cost of the cached run.
Every row starts from the same noise. Takes a sampler's config; writes compare.png and compare.json into its `out`.
"""

from skipdit.caching.policies import CacheSpec
from skipdit.class_to_image.sample import Config, load
from skipdit.evaluation.compare import run
from skipdit.sampling.class_conditional import ClassSampler

WINDOW = CacheSpec.parse("N2-1000-20")


def open_sampler(config: Config, branch: int | None) -> ClassSampler:
    return ClassSampler(config, load(config, branch))


def main() -> None:
    run(Config, __doc__, open_sampler, WINDOW, "image", tiles=lambda images: images[:10])


if __name__ == "__main__":
    main()
