"""The same clips with several caches: a table of speed and fidelity, a picture and a film to look at.

    python class-to-video/compare.py --config configs/class-to-video/demo.yaml

Rows: the uncached run, reuse (order 0), forecast (order 1), and simply fewer steps at the cost of the cached run.
Every row starts from the same noise. Takes a sampler's config; writes compare.png (four frames of two clips),
compare.gif (a line per row, all in motion) and compare.json into its `out`.
"""

from pathlib import Path

from torch import Tensor

from skipdit.cache import CacheSpec
from skipdit.class_to_video.sample import Config, load
from skipdit.compare import run
from skipdit.media import side_by_side, write_gif


def tiles(clips: Tensor) -> Tensor:
    """Four frames of each of the first two clips, (8, 3, H, W)."""
    return clips[:2, :: max(1, clips.shape[1] // 4)][:, :4].flatten(0, 1)


def main() -> None:
    config, rows = run(Config, __doc__, load, CacheSpec.parse("N2-900-49"), "clip", tiles)
    shown = min(8, config.num_samples)
    film = Path(config.out) / "compare.gif"
    write_gif(film, side_by_side([clip for row in rows for clip in row[:shown]], columns=shown), config.fps)
    print(f"in motion: {film}")


if __name__ == "__main__":
    main()
