"""Fetch the released text-to-video model and what its pipeline needs, from the Hugging Face Hub.

    python text-to-video/download.py                           # Latte-skip.pt and the Latte-0 folder, into checkpoints/
    python text-to-video/download.py --only plain              # the plain Latte, which training starts from
    python text-to-video/download.py --only data --dir data    # the published training clips, into data/video_seg

Short for `skipdit download text-to-video`; see its --help.
"""

import sys

from skipdit.__main__ import main

if __name__ == "__main__":
    main(["download", "text-to-video", *sys.argv[1:]])
