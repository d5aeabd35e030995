"""What the server of ranks imports before it forks any of them: all that takes long."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import deepspeed.ops  # noqa: F401

from lrscale.stages import worker  # noqa: F401
from tests.distributed.programs import equality, resume  # noqa: F401
