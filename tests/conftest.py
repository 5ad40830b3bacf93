"""One thread for all tests: their matrices are so small that a second only waits for the first."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the programs that tests start

import torch

torch.set_num_threads(1)
