"""Exact diffusion inversion: bi-directional integration approximation and its relatives.

Zhang, Lewis and Kleijn, "Exact Diffusion Inversion via Bi-directional Integration Approximation", arXiv:2307.10829 (ECCV 2024).

    grid = bdia.vp_grid(alphas_cumprod, 50)
    coeffs = bdia.coefficients(grid, gamma=0.96)
    pair = bdia.encode(noise_fn, params, image, grid, coeffs)     # data -> noise; keep both states
    again = bdia.decode(noise_fn, params, pair, grid, coeffs)     # noise -> data, exact

Where to read what:
  grid        levels, index 0 = data                       prediction   eps / x0 / v / flow converters, classifier-free guidance
  two_step    BDIA-DDIM and O-BELM: the paper's equations   diagnostics  error amplification, stability, log-determinant
  ddim        DDIM, its inversions, fixed-point inversion   edict        the two-chain competitor
  heun        EDM's Heun, BDIA-EDM, DPM-Solver++ 2M         coupled      reversible Heun, McCallum-Foster / Rex with tableaus
  flow        RF-Solver, FireFlow, Uni-Inv                  integer      bit-exact inversion in fixed point
  multistep   BELM with more than two steps                 adaptive     levels chosen by the error, as a grid
"""

from janax.algorithms.bdia.adaptive import AdaptiveInfo, adaptive_grid
from janax.algorithms.bdia.coupled import (
    DOPRI5,
    EULER,
    HEUN,
    MIDPOINT,
    RALSTON,
    RK4,
    SSPRK3,
    TSIT5,
    CoupledState,
    ReversibleHeunState,
    Tableau,
    coupled_decode,
    coupled_encode,
    coupled_sample,
    reversible_heun_decode,
    reversible_heun_encode,
    reversible_heun_sample,
)
from janax.algorithms.bdia.ddim import FixedPointInfo, ddim_invert, ddim_sample, fixed_point_invert, move
from janax.algorithms.bdia.diagnostics import (
    Amplification,
    amplification,
    characteristic_roots,
    log_determinant,
    minimum_gamma,
    stability_limit,
)
from janax.algorithms.bdia.edict import EdictState, edict_decode, edict_encode, edict_log_determinant, edict_sample
from janax.algorithms.bdia.flow import flow_solve, sigma_bar_velocity
from janax.algorithms.bdia.grid import (
    Grid,
    Levels,
    edm_grid,
    edm_levels,
    flow_grid,
    flow_levels,
    move_coefficients,
    sigma_bar,
    vp_grid,
    vp_levels,
)
from janax.algorithms.bdia.heun import (
    bdia_dpm_solver_2m_sample,
    bdia_heun_decode,
    bdia_heun_encode,
    bdia_heun_sample,
    dpm_solver_2m_sample,
    heun_sample,
)
from janax.algorithms.bdia.integer import IntegerState, dequantize, integer_decode, integer_encode, integer_sample, quantize, side_bits
from janax.algorithms.bdia.multistep import (
    MultistepCoeffs,
    MultistepState,
    multistep_coefficients,
    multistep_decode,
    multistep_encode,
    multistep_roots,
    multistep_sample,
)
from janax.algorithms.bdia.prediction import (
    Guidance,
    NoiseFn,
    edm_schedule,
    flow_schedule,
    from_noise,
    guided,
    noise_fn_from,
    to_noise,
    vp_schedule,
)
from janax.algorithms.bdia.two_step import (
    BdiaCoeffs,
    BdiaState,
    EditInfo,
    belm_coefficients,
    coefficients,
    decode,
    edit,
    encode,
    sample,
    step,
    unstep,
)

__all__ = [
    "DOPRI5",
    "EULER",
    "HEUN",
    "MIDPOINT",
    "RALSTON",
    "RK4",
    "SSPRK3",
    "TSIT5",
    "AdaptiveInfo",
    "Amplification",
    "BdiaCoeffs",
    "BdiaState",
    "CoupledState",
    "EdictState",
    "EditInfo",
    "FixedPointInfo",
    "Grid",
    "Guidance",
    "IntegerState",
    "Levels",
    "MultistepCoeffs",
    "MultistepState",
    "NoiseFn",
    "ReversibleHeunState",
    "Tableau",
    "adaptive_grid",
    "amplification",
    "bdia_dpm_solver_2m_sample",
    "bdia_heun_decode",
    "bdia_heun_encode",
    "bdia_heun_sample",
    "belm_coefficients",
    "characteristic_roots",
    "coefficients",
    "coupled_decode",
    "coupled_encode",
    "coupled_sample",
    "ddim_invert",
    "ddim_sample",
    "decode",
    "dequantize",
    "dpm_solver_2m_sample",
    "edict_decode",
    "edict_encode",
    "edict_log_determinant",
    "edict_sample",
    "edit",
    "edm_grid",
    "edm_levels",
    "edm_schedule",
    "encode",
    "fixed_point_invert",
    "flow_grid",
    "flow_levels",
    "flow_schedule",
    "flow_solve",
    "from_noise",
    "guided",
    "heun_sample",
    "integer_decode",
    "integer_encode",
    "integer_sample",
    "log_determinant",
    "minimum_gamma",
    "move",
    "move_coefficients",
    "multistep_coefficients",
    "multistep_decode",
    "multistep_encode",
    "multistep_roots",
    "multistep_sample",
    "noise_fn_from",
    "quantize",
    "reversible_heun_decode",
    "reversible_heun_encode",
    "reversible_heun_sample",
    "sample",
    "side_bits",
    "sigma_bar",
    "sigma_bar_velocity",
    "stability_limit",
    "step",
    "to_noise",
    "unstep",
    "vp_grid",
    "vp_levels",
    "vp_schedule",
]
