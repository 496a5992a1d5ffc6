"""The passes, in the one order in which they run."""

from hvcompile.passes.first_block_cache import FirstBlockCache
from hvcompile.passes.float8_attention import Float8Attention
from hvcompile.passes.float8_linears import Float8Linears
from hvcompile.passes.host_weights import HostWeights
from hvcompile.passes.sharded_attention import ShardedAttention
from hvcompile.passes.sparse_attention import SparseAttention
from hvcompile.passes.unmasked_attention import UnmaskedAttention
from hvcompile.pipeline import Pass

__all__ = [
    "PASSES",
    "FirstBlockCache",
    "Float8Attention",
    "Float8Linears",
    "HostWeights",
    "ShardedAttention",
    "SparseAttention",
    "UnmaskedAttention",
]

if __name__ != "hvcompile.passes":
    raise ImportError("import the passes as hvcompile.passes: under another name their classes would exist twice")

PASSES: tuple[type[Pass], ...] = (
    # First: it derives where the sequence is from the graph as the model wrote it.
    ShardedAttention,
    # Looks for attention in the bodies, and at the mask where it is still made before the blocks.
    UnmaskedAttention,
    # Takes attention without a mask, which the one before leaves: a mask is in the order that tokens came in.
    SparseAttention,
    # Takes attention without a mask too, where it reads all keys.
    Float8Attention,
    # Edits bodies, which the cache's branches call as well.
    Float8Linears,
    # It moves blocks 2..N into a branch, and the others look for blocks at the top level.
    FirstBlockCache,
    # Last of all: weights are brought where they are read, inside the branch, and in float8 where they are.
    HostWeights,
)
