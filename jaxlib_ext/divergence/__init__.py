"""Divergences between categorical distributions: one scalar generator gives the value, f', f'', the exact form and every sampled estimator.

Which argument is which, everywhere in this file: p comes first and is what is trained (student, policy); q comes second and is what it is
compared with (teacher, reference). u = p / q, l = log u, D_f(p || q) = sum_v q_v f(u_v) with f convex and f(1) = 0. "Forward" is KL(q || p),
which covers all that q does; "reverse" is KL(p || q), which avoids what q does not do.

    exact, on logits         value                                                    f'(u), up to a constant        at most
    forward_kl               sum q log(q / p)                                         -1 / u                         -
    reverse_kl               sum p log(p / q)                                         log u                          -
    jeffreys                 forward_kl + reverse_kl                                  log u - 1 / u                  -
    js(beta)                 beta KL(q || m) + (1 - beta) KL(p || m)                  (1 - beta) log(p / m)          H(beta); log 2 at 1/2
                             with m = beta q + (1 - beta) p
    skew_kl(alpha)           KL(q || alpha q + (1 - alpha) p)                         -(1 - alpha) q / m             -log alpha
    skew_reverse_kl(alpha)   KL(p || alpha p + (1 - alpha) q)                         log(p / m) - alpha p / m       -log alpha
    alpha_divergence(alpha)  (sum q^alpha p^(1 - alpha) - 1) / (alpha (alpha - 1))    -u^(-alpha) / alpha            1 / (alpha (1 - alpha))
    total_variation          sum |p - q| / 2                                          sign(u - 1) / 2                1
    squared_hellinger        1 - sum sqrt(p q)                                        -u^(-1/2) / 2                  1
    chi2_forward             sum (q - p)^2 / p                                        -u^(-2)                        -
    chi2_reverse             sum (p - q)^2 / q                                        2 u                            -
    renyi(alpha)             log(sum q^alpha p^(1 - alpha)) / (alpha - 1)             (not of the form D_f)          -
    adaptive_kl              r forward_kl + (1 - r) reverse_kl                        (not of the form D_f)          -

All are in nats, at least 0, and 0 where p = q, with a zero gradient there. Differentiable in both arguments by plain autodiff; with respect to
the logits of p the gradient is p_k (w_k - sum_v p_v w_v), w = f'(u).

Extremes. A token forbidden (-inf) by both contributes exactly 0. One forbidden by p or q only is taken to have log-probability -1e4 there: the
bounded divergences have their exact value, the unbounded ones a large finite one instead of infinity. A forbidden logit has a zero gradient.
A row in which p or q forbids everything gives 0 with zero gradients. Powers of u beyond exp(60) in float32 (exp(680) in float64), which only
the chi-squared and alpha outside [0, 1] reach, are continued by their tangent.

    value = divergence.js(student_logits, teacher_logits, beta=0.1)                                         # [... v] -> [...]
    value = divergence.per_token("js", student_logits, teacher_logits, beta=0.1, temperature=2.0, mask=mask)
    loss = divergence.from_reference(divergence.FORWARD_KL, log_p, log_q)                                   # tokens sampled from q
    mine = divergence.Generator(h=lambda l: jnp.square(l) * jnp.exp(l))                                     # an f of your own
"""

from janax.jaxlib_ext.divergence.generators import (
    CHI2_FORWARD,
    CHI2_REVERSE,
    FORWARD_KL,
    JEFFREYS,
    REVERSE_KL,
    SQUARED_HELLINGER,
    TOTAL_VARIATION,
    Generator,
    alpha_generator,
    conjugate,
    dual,
    f,
    f_prime,
    f_second,
    inverse_f_prime,
    js_generator,
    skew_kl_generator,
    skew_reverse_kl_generator,
    terms,
    terms_and_slopes,
)
from janax.jaxlib_ext.divergence.logits import (
    NAMES,
    Kind,
    adaptive_kl,
    alpha_divergence,
    chi2_forward,
    chi2_reverse,
    exact,
    expected_f_prime,
    forward_kl,
    from_support,
    head_share,
    jeffreys,
    js,
    per_token,
    renyi,
    renyi_value,
    resolve,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    squared_hellinger,
    top_k,
    total_variation,
)
from janax.jaxlib_ext.divergence.sampled import (
    control_variate,
    from_behaviour,
    from_policy,
    from_reference,
    importance_weights,
    k1,
    k2,
    k3,
    with_value,
)

__all__ = [
    "CHI2_FORWARD",
    "CHI2_REVERSE",
    "FORWARD_KL",
    "JEFFREYS",
    "NAMES",
    "REVERSE_KL",
    "SQUARED_HELLINGER",
    "TOTAL_VARIATION",
    "Generator",
    "Kind",
    "adaptive_kl",
    "alpha_divergence",
    "alpha_generator",
    "chi2_forward",
    "chi2_reverse",
    "conjugate",
    "control_variate",
    "dual",
    "exact",
    "expected_f_prime",
    "f",
    "f_prime",
    "f_second",
    "forward_kl",
    "from_behaviour",
    "from_policy",
    "from_reference",
    "from_support",
    "head_share",
    "importance_weights",
    "inverse_f_prime",
    "jeffreys",
    "js",
    "js_generator",
    "k1",
    "k2",
    "k3",
    "per_token",
    "renyi",
    "renyi_value",
    "resolve",
    "reverse_kl",
    "skew_kl",
    "skew_kl_generator",
    "skew_reverse_kl",
    "skew_reverse_kl_generator",
    "squared_hellinger",
    "terms",
    "terms_and_slopes",
    "top_k",
    "total_variation",
    "with_value",
]
