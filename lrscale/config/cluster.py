"""Where a run runs: what is asked of SLURM, and what its nodes are like."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator

from lrscale.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Section

TimeLimit = Annotated[str, StringConstraints(pattern=r"^(\d+|\d+:\d\d(:\d\d)?|\d+-\d\d?(:\d\d){0,2})$")]
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,@+-]*$")]
"""A name of a node or an interface; several with commas."""
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
RoleName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]

OWN_FLAGS = (
    "--job-name", "-J", "--nodes", "-N", "--ntasks", "-n", "--ntasks-per-node", "--partition", "-p", "--account", "-A",
    "--time", "-t", "--signal", "--output", "-o", "--error", "-e", "--open-mode", "--requeue", "--no-requeue",
    "--exclude", "-x", "--export", "--wrap", "--array", "-a", "--mem", "--cpus-per-task", "-c", "--chdir", "-D",
)  # fmt: skip
"""Options of sbatch that other keys decide, or that would break a run (or put secrets on a command line)."""


class NoContainer(Section):
    """The job runs in the environment that launched it."""

    kind: Literal["none"] = "none"


class PyxisContainer(Section):
    """srun's own --container-image, where the cluster has NVIDIA's pyxis plugin."""

    kind: Literal["pyxis"]
    image: str
    """A .sqsh file, or a registry's name of an image."""
    mounts: tuple[str, ...] = ()
    """Besides the run directory: SRC:DST[:FLAGS]."""
    python: str = "python3"
    """The interpreter in the image that has lrscale installed."""


class ApptainerContainer(Section):
    """`apptainer exec` on each node, with GPUs where the recipe uses them."""

    kind: Literal["apptainer"]
    image: str
    """A .sif file, or a docker:// name."""
    mounts: tuple[str, ...] = ()
    """Besides the run directory: SRC:DST[:FLAGS]."""
    python: str = "python3"
    """The interpreter in the image that has lrscale installed."""


ContainerConfig = Annotated[NoContainer | PyxisContainer | ApptainerContainer, Field(discriminator="kind")]


class RoleConfig(Section):
    """Nodes of the allocation that run a command of their own beside the trainer."""

    name: RoleName
    nodes: PositiveInt = 1
    command: str
    """One shell command, started once on each node of the role; LRSCALE_RUN_DIR names the run directory there."""


class SplitConfig(Section):
    """One job for trainer and other roles. The trainer takes the first cluster.nodes, each role the next ones."""

    roles: tuple[RoleConfig, ...] = ()
    heterogeneous: bool = False
    """Ask for each role as a component of a heterogeneous job. Starts only when all parts fit at the same time."""

    @field_validator("roles")
    @classmethod
    def _names_once(cls, roles: tuple[RoleConfig, ...]) -> tuple[RoleConfig, ...]:
        names = [role.name for role in roles]
        if len(set(names)) != len(names) or "train" in names:
            raise ValueError(f"roles: each needs a name of its own, and none is called train (given {names})")
        return roles


class ClusterConfig(Section):
    """What is asked of SLURM. What a whole cluster has in common belongs into the cluster file (`lrscale init`)."""

    nodes: PositiveInt = 1
    """Nodes of the trainer; other roles (split.roles) come on top."""
    gpus_per_node: PositiveInt = 1
    gpu_memory_gib: PositiveFloat = 80.0
    """Of one GPU, for the plan's arithmetic."""
    partition: str | None = None
    account: str | None = None
    time_limit: TimeLimit | None = None
    """SLURM's forms: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS; quoted if it is minutes alone."""
    gpu_directive: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How GPUs are asked for: --gpus-per-node=8, --gres=gpu:8, or not at all (whole nodes bring theirs)."""
    cpus_per_rank: PositiveInt | None = None
    """null shares out all CPUs of the node."""
    memory: Annotated[str, StringConstraints(pattern=r"^\d+[KMGT]?$")] | None = None
    """Host memory a node as SLURM writes it (200G); null takes whole nodes (--exclusive --mem=0)."""
    exclude: tuple[Word, ...] = ()
    """Nodes never to run on; bad_nodes.txt of the run directory adds to them."""
    modules: tuple[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_./+-]*$")], ...] = ()
    """Loaded on every node by `module load`."""
    container: ContainerConfig = Field(default_factory=NoContainer)
    secrets: tuple[VariableName, ...] = ()
    """Names of environment variables the run needs (HF_TOKEN). They are inherited, and never written anywhere."""
    interface: Word | None = None
    """Network interface for NCCL and gloo (ib0); null leaves the choice to them."""
    max_restarts: NonNegativeInt = 20
    """How often the job may go back into the queue; it does so only while checkpoints make progress."""
    drain_s: PositiveInt = 600
    """Seconds before the time limit at which the run is asked to save and go back into the queue."""
    read_gib_s: PositiveFloat = 1.0
    """Read bandwidth of a node from the file system with the model, in GiB/s; decides how long ranks wait at start."""
    sbatch_flags: tuple[str, ...] = ()
    """Further options of sbatch as they are, one word each: --qos=high."""
    preflight: bool = True
    """Check nodes, GPUs and network as the job's first step (`lrscale doctor` does the login node's part)."""
    split: SplitConfig = SplitConfig()

    @property
    def memory_mib(self) -> int:
        """Of a node's host, as asked for (SLURM's unit without a letter is MiB); 0 for whole nodes."""
        if self.memory is None:
            return 0
        factor = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}.get(self.memory[-1], 1)
        return int(int(self.memory.rstrip("KMGT")) * factor)

    @field_validator("sbatch_flags")
    @classmethod
    def _flags_of_others(cls, flags: tuple[str, ...]) -> tuple[str, ...]:
        for flag in flags:
            name = flag.partition("=")[0]
            if not flag.startswith("-") or "\n" in flag or name in OWN_FLAGS:
                raise ValueError(
                    f"sbatch_flags: {flag!r} cannot stand here; give options such as --qos=high, one word each. Other "
                    "keys decide nodes, partition, time, memory, output, requeueing and environment"
                )
        return flags


class ReportConfig(Section):
    """Where figures go besides metrics.jsonl, which is always written."""

    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    project: str = "lrscale"
    html: bool = True
    """Write report.html and its PNG chart when the run ends."""
