"""Fetch the released text-to-image model and what its pipeline needs, from the Hugging Face Hub.

    python text-to-image/download.py                       # into ckpts/, where the sampler and the trainer look
    python text-to-image/download.py --only diffusers      # as diffusers has it, into ckpts/HunyuanDiT-v1.2-Diffusers

Short for `skipdit download text-to-image`; see its --help.
"""

import sys

from skipdit.__main__ import main

if __name__ == "__main__":
    main(["download", "text-to-image", *sys.argv[1:]])
