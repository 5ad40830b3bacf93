"""Gradient-based refinement of hyperparameters inside Optuna trials, by greedy hypergradient descent."""
