"""The Optuna side: seeds from any sampler, refinement inside a trial, and what is written to the storage."""
