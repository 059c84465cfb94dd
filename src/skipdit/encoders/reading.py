"""How text encoders are given texts, and what of their output a model reads."""

from typing import NamedTuple

CHUNK = 32  # texts per call of the encoder


class Reading(NamedTuple):
    """How an encoder is given texts, and what of its output a model reads.

    Attributes:
        role: what reads them: Latte, or one of the two places for texts in Hunyuan-DiT.
        max_tokens: what a longer text says beyond is cut off; a shorter one is padded.
        clean: in lower case, without links and markup, as `LattePipeline` has them; otherwise only stripped.
        whole: the embeddings of padding are read, too.
    """

    role: str
    max_tokens: int
    clean: bool = False
    whole: bool = False


LATTE = Reading("latte", 120, clean=True)
CLIP = Reading("clip", 77)
T5 = Reading("t5", 256, whole=True)  # the pooler of Hunyuan-DiT knows no mask
READINGS = {reading.role: reading for reading in (LATTE, CLIP, T5)}
