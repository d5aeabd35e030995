"""AdamW for one parameter group, with float32 masters where the weights are narrower.

At a learning rate of 5e-7 an AdamW step is far below half a unit in the last place of a bfloat16
weight: applied to the weight itself it would round away for ever. So narrow weights (bfloat16,
float16) are stepped through a float32 master copy, and their gradients are summed over
micro-batches in float32 too.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.hooks import RemovableHandle

from lrscale.config.optimisation import OptimisationConfig
from lrscale.parallel.engine import NonFiniteError

_MASTER = "master."
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


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

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and masters: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`, `master.NAME`."""
        tensors = {}
        for name, master in self.masters.items():
            for key, value in self.adamw.state.get(master, {}).items():
                tensors[f"{key}.{name}"] = value
            if master is not self.parameters[name]:
                tensors[_MASTER + name] = master.detach()
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restores `state_tensors`. Raises ValueError, nothing changed, where names or shapes do not fit."""
        states, problems = {}, []
        for index, (name, master) in enumerate(self.masters.items()):
            found = {key: tensors[f"{key}.{name}"] for key in _MOMENTS if f"{key}.{name}" in tensors}
            saved_master = tensors.get(_MASTER + name)
            narrow = master is not self.parameters[name]
            if (saved_master is not None) != narrow:
                problems.append(f"{name}: master copy {'missing' if narrow else 'not expected'}")
            if found and set(found) != set(_MOMENTS):
                problems.append(f"{name}: only {sorted(found)} of {sorted(_MOMENTS)}")
            shaped = [found.get("exp_avg"), found.get("exp_avg_sq"), saved_master]
            if any(value is not None and value.shape != master.shape for value in shaped):
                problems.append(f"{name}: another shape")
            if found:
                states[index] = {key: value.clone() for key, value in found.items()}
        if problems:
            raise ValueError("optimizer state does not fit this model and dtype: " + "; ".join(problems[:5]))
        self.adamw.load_state_dict({"state": states, "param_groups": self.adamw.state_dict()["param_groups"]})
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                master.copy_(tensors[_MASTER + name])

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
