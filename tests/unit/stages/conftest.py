"""One torch thread: tiny tensors, and figures that do not depend on the machine's cores."""

import torch

torch.set_num_threads(1)
