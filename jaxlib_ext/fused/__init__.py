"""Log-probabilities from hidden states and an unembedding, without the [tokens, vocabulary] array, forward or backward.

    log_probs = fused.token_log_probs(h, w, tokens)                 # h [... d], w [d v]; differentiable, any cotangent per token
    loss = fused.weighted_nll(h, w, tokens, weights)                # -sum(weights log_probs), one matrix product fewer
    values, ids = fused.top_k(h, w, 20)

`token_log_probs` walks the vocabulary in chunks, with a running maximum and sum; its backward pass makes each chunk of logits again. The
weighted forms walk the tokens: all logits of a chunk of them are there at once, and are differentiated at once. In units of the product
h w (2 n d v FLOPs), value and gradients cost

    the plain form          1 forward, 2 backward
    token_log_probs         1 forward, 3 backward       (1 and 2 if `w` needs no gradient: the compiler drops the unused product)
      keep_expectation      2 forward, 2 backward       (2 and 0 if `w` needs no gradient)
    weighted_nll            3 forward, 0 backward       (the cotangents are known in advance)

and no temporary of the size of the logits: benchmarks/fused_logprobs.py.

Placement. Under `jit` the arrays may lie on a mesh. A chunk is not a run of neighbouring columns but the same window of each of 16 equal
parts of the vocabulary, so a sharded `w` is never gathered when the mesh axis divides 16 (and the vocabulary). What the compiler cannot do
is to keep a sum over devices pending through the loop: it adds the gradient of `h` up over vocabulary shards once per chunk, and in the
weighted forms that of `w` over token shards. Inside `jax.shard_map` (with its default check_vma=True), `axis_name` names the axis that
shards the vocabulary, and there is one sum in the end.
"""

from janax.jaxlib_ext.fused.divergences import TokenDivergence, divergence, weighted_divergence
from janax.jaxlib_ext.fused.likeliest import top_k
from janax.jaxlib_ext.fused.tokens import TokenStatistics, statistics, token_log_probs, weighted_nll

__all__ = [
    "TokenDivergence",
    "TokenStatistics",
    "divergence",
    "statistics",
    "token_log_probs",
    "top_k",
    "weighted_divergence",
    "weighted_nll",
]
