"""The same pictures with several caches: a table of speed and fidelity, and a picture to look at.

    python text-to-image/compare.py --config configs/text-to-image/demo.yaml

Rows: the uncached run, reuse (order 0), forecast (order 1), and simply fewer steps at the cost of the cached run.
Every row starts from the same noise. Takes a sampler's config; writes compare.png and compare.json into its `out`.
"""

from skipdit.caching.policies import CacheSpec
from skipdit.evaluation.compare import run
from skipdit.text_to_image.sample_t2i import Config, TextSampler

WINDOW = CacheSpec.parse("N2-700-50")
open_sampler = TextSampler


def main() -> None:
    run(Config, __doc__, open_sampler, WINDOW, "picture", tiles=lambda pictures: pictures[:10])


if __name__ == "__main__":
    main()
