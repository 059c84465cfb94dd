"""Caching methods that people use instead of Skip-Cache, for the four backbones, plain or with skips.

    with FORA(interval=2).on(model, timesteps) as run:
        ...                      # sample as ever, any number of batches; every model call is one step
    run.full, run.partial        # calls of the model that ran all of it, and that left something out

A model is what it was after the context, and every run of `len(timesteps)` calls begins with nothing stored. What a
method saves of a step depends on the method; count FLOPs to see it. At interval 1 or threshold 0 all of them leave the
model's output as it is, to the bit.

Two mechanisms. `modules`: attention, cross-attention and MLP compute, reuse or extrapolate their output (FORA, PAB,
T-GATE, TaylorSeer). `ranges`: layers a .. e-1 give way to adding what they added in the last full step (Delta-DiT,
FBCache, DBCache, TeaCache); with long skips, the fuse modules of these layers are left out with them, and layers
outside of the range get the shallow features of the last full step where the shallow layer is in it. A layer is a pair
of blocks in the two Lattes.

What libraries have of these, tried with diffusers 0.42.1 and cache-dit 1.5.3:

- diffusers' `TaylorSeerCacheConfig` hooks any module, and is what `TaylorSeer` uses here.
- Its `apply_pyramid_attention_broadcast` passes over all attention that is not of diffusers' own classes, ours too,
  without a word. `PAB` is tested against its hook.
- Its `apply_first_block_cache` is right for plain DiT and HunyuanDiT, once their block classes are registered; on the
  Lattes a cached step would add the embedding of frames twice, which lies between two blocks, and with skips it would
  run the fuse modules on layers that were left out. `DBCache` is tested against it where it is right.
- cache-dit calls all blocks with the arguments of the first. On plain DiT it gives what `DBCache` gives, to the bit, as
  long as no modulations are computed ahead, which the samplers do; HunyuanDiT and the Lattes, whose blocks have keys
  and values or axes of their own, come out wrong without a word, even at full steps.
"""

from baselines.base import Baseline, Run
from baselines.modules import FORA, PAB, TaylorSeer, TGate, parts_of
from baselines.ranges import DBCache, DeltaDiT, TeaCache

__all__ = ["FORA", "PAB", "Baseline", "DBCache", "DeltaDiT", "Run", "TGate", "TaylorSeer", "TeaCache", "parts_of"]
