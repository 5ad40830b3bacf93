"""Hypergradients by several packages, of one problem: one package a file, each with a table ``METHODS``.

Every file is imported only when its package is asked for, as none but our own need be installed.
"""

PACKAGES = ("ours", "higher", "torchopt", "betty", "gradhpo", "jax_greedy")
