"""Tests import the scripts as a user's own script would: from the repository's root."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(2)
