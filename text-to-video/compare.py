"""The same clips with several caches: a table of speed and fidelity, a picture and a film to look at.

    python text-to-video/compare.py --config configs/text-to-video/demo.yaml

Rows: the uncached run, reuse (order 0), forecast (order 1), and simply fewer steps at the cost of the cached run.
Every row starts from the same noise. Takes a sampler's config; writes compare.png (four frames of two clips),
compare.gif (a line per row, all in motion) and compare.json into its `out`.
"""

from skipdit.caching.policies import CacheSpec
from skipdit.evaluation.compare import film, four_frames, run
from skipdit.text_to_video.sample_t2v import Config, TextSampler

WINDOW = CacheSpec.parse("N2-700-50")
open_sampler = TextSampler


def main() -> None:
    config, rows = run(Config, __doc__, open_sampler, WINDOW, "clip", four_frames)
    film(rows, config.out, config.fps)


if __name__ == "__main__":
    main()
