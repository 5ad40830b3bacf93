"""Operators whose second derivative is another than PyTorch's, which computes too much, or is wrong.

A product u·∂g/∂α goes once through the graph of the gradient g = ∇_w L_train. PyTorch's second derivative of a
convolution or a normalization gives all of its results, for the first derivative's cotangent and for the operator's own
inputs, whichever are wanted. Within ``LeanOperators`` they are computed as ``convolutions`` and ``normalizations`` have
it. ``PlainWeightNorm`` is about an operator whose second derivative is wrong.
"""

from optuna_greedyhg.hypergrad.second_derivatives.base import Demand
from optuna_greedyhg.hypergrad.second_derivatives.operators import LeanOperators, has_lean_layers, lean_among
from optuna_greedyhg.hypergrad.second_derivatives.weight_norm import PlainWeightNorm, has_weight_norm

__all__ = ["Demand", "LeanOperators", "PlainWeightNorm", "has_lean_layers", "has_weight_norm", "lean_among"]
