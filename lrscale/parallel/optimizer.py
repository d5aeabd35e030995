"""AdamW for one parameter group, with float32 masters where the weights are narrower.

At a learning rate of 5e-7 an AdamW step is far below half a unit in the last place of a bfloat16
weight: applied to the weight itself it would round away for ever. So narrow weights (bfloat16,
float16) are stepped through a float32 master copy, and their gradients are summed over
micro-batches in float32 too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.hooks import RemovableHandle

from lrscale.config.optimisation import OptimisationConfig
from lrscale.parallel.engine import NonFiniteError


class GroupOptimizer:
    """Steps named parameters; gradients arrive by ordinary backward passes.

    While it lives, gradients of narrow parameters are moved to their masters as they are
    accumulated; `close` gives the parameters back.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], config: OptimisationConfig) -> None:
        self.parameters = dict(parameters)
        if not self.parameters:
            raise ValueError("a group without parameters cannot be trained")
        self.masters = {name: _master_of(parameter) for name, parameter in self.parameters.items()}
        self._hooks = [
            _hook_up(parameter, self.masters[name])
            for name, parameter in self.parameters.items()
            if self.masters[name] is not parameter
        ]
        self.adamw = torch.optim.AdamW(
            list(self.masters.values()),
            lr=0.0,  # given with each step
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def step(self, *, learning_rate: float, max_grad_norm: float) -> float:
        """Clip, step, clear. Returns the norm before clipping; 0.0, with nothing moved, where there is no gradient."""
        graded = {name: master for name, master in self.masters.items() if master.grad is not None}
        if not graded:
            return 0.0
        total = get_total_norm([master.grad for master in graded.values()])
        norm = total.full_tensor() if isinstance(total, DTensor) else total
        if not bool(torch.isfinite(norm)):
            culprit = _first_non_finite(graded)
            self.clear_gradients()
            raise NonFiniteError(f"gradient norm is {float(norm)}{culprit}; no weight was changed")
        clip_grads_with_norm_(graded.values(), max_grad_norm, total)
        for settings in self.adamw.param_groups:
            settings["lr"] = learning_rate
        self.adamw.step()
        self._publish_masters()
        self.clear_gradients()
        return float(norm)

    def collect_gradients(self) -> None:
        """Move the gradients of narrow parameters on to their masters, for engines that set them without autograd
        (FSDP2): no hook tells of those.
        """
        for name, parameter in self.parameters.items():
            master, gradient = self.masters[name], parameter.grad
            if master is not parameter and gradient is not None:
                parameter.grad = None
                master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)

    def clear_gradients(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = None
            self.masters[name].grad = None

    def close(self) -> None:
        self.clear_gradients()
        for hook in self._hooks:
            hook.remove()

    def create_states(self) -> None:
        """Moments of zero for every parameter, as before its first step."""
        for master in self.masters.values():
            self.adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    def states(self) -> Iterator[tuple[str, str, Tensor]]:
        """(`exp_avg`, `exp_avg_sq`, `step` or `master`, parameter's name, live tensor) of everything that there is."""
        for name, master in self.masters.items():
            for key, value in self.adamw.state.get(master, {}).items():
                yield key, name, value
            if master is not self.parameters[name]:
                yield "master", name, master.detach()

    @torch.no_grad()
    def _publish_masters(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])


def _master_of(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return nn.Parameter(parameter.detach().float())


def _hook_up(parameter: nn.Parameter, master: nn.Parameter) -> RemovableHandle:
    """Send every gradient that arrives at the parameter on to its master, summed in float32."""

    def move(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)

    required = parameter.requires_grad
    parameter.requires_grad_(requires_grad=True)  # torch refuses the hook on a parameter that is frozen at the moment
    handle = parameter.register_post_accumulate_grad_hook(move)
    parameter.requires_grad_(required)
    return handle


def _first_non_finite(graded: dict[str, nn.Parameter]) -> str:
    for name, master in graded.items():
        finite = torch.isfinite(master.grad).all()
        if not bool(finite.full_tensor() if isinstance(finite, DTensor) else finite):
            return f" (first in {name})"
    return " (each entry is finite: the sum of squares overflows)"
