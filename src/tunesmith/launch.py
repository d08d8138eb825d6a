"""Starting a recipe on several processes: torchrun on this machine, or the file that a cluster's own tool takes.

Takes a recipe's `launch` section; gives the exit status of the run, or a complete sbatch script, SkyPilot task or dstack task. No scheduler
is ours: the file is submitted with `sbatch`, `sky launch` or `dstack apply`. The run directory must lie where every machine sees it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from .errors import RecipeError
from .recipe import ZERO, LaunchSection, Recipe, load_recipe
from .rundir import launched

PORT = 29500  # where the machines meet
WARNING_SECONDS = 300  # from a signal to the end, before Slurm's limit too, in which a checkpoint is written
PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # torchrun hands the signal on, and would kill its processes 30 s later
FOLDER = "/tunesmith"  # where a dstack container has what is in the folder of the file
SENT = ("sky", "dstack")  # tools that take the current folder to the machines; under Slurm they see the same files


def starts_others(launch: LaunchSection) -> bool:
    """Whether `run` and `train` are to start the processes themselves. Raises RecipeError where they lie on several machines."""
    if launched() or (launch.nproc_per_node or 1) * launch.nodes == 1:
        return False
    if launch.nodes > 1:
        raise RecipeError(
            f"the recipe asks for {launch.nodes} machines, and this is one",
            where="launch.nodes",
            mend="submit the file that `tunesmith launch RECIPE --print slurm|sky|dstack` prints, or start torchrun on each machine",
        )
    return True


def require_processes(launch: LaunchSection) -> None:
    """Raises RecipeError where the recipe asks for several processes, and this one is alone."""
    if starts_others(launch):
        raise RecipeError(
            f"the recipe asks for {launch.nproc_per_node} processes, and this is one",
            where="launch.nproc_per_node",
            mend="start it on the command line (tunesmith run RECIPE) or under torchrun; or leave it out",
        )


def start(launch: LaunchSection, words: Sequence[str]) -> int:
    """Runs `tunesmith WORDS` in the recipe's number of processes on this machine; gives the exit status of the first that failed, or 0.

    Raises RecipeError where DeepSpeed is asked for and not installed: once, and not in each of the processes.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    from .train.zero import require_deepspeed

    if launch.strategy in ZERO:
        require_deepspeed(launch.strategy)
    os.environ.setdefault(PATIENCE, str(WARNING_SECONDS))
    try:
        run(parse_args(["--standalone", f"--nproc_per_node={launch.nproc_per_node}", "-m", "tunesmith", *words]))
    except ChildFailedError as error:
        return max(1, error.get_first_failure()[1].exitcode)  # below 0 where a signal killed it
    except SignalException:
        return 130
    return 0


def cluster_file(path: str | Path, tool: str, sets: Sequence[str] = ()) -> str:
    """The file for a tool of `TOOLS`, which runs the recipe at `path` with the same `key=value` overrides.

    Raises RecipeError where the recipe is wrong, or lies outside the folder that the tool takes to the machines.
    """
    recipe = load_recipe(path, sets)
    if tool in SENT:
        path, sent = Path(path).resolve(), Path.cwd()
        if not path.is_relative_to(sent):
            raise RecipeError(
                f"{tool} takes the current folder to the machines, and the recipe lies outside it",
                where=str(path),
                mend="go to a folder that holds the recipe and its data, and launch it from there",
            )
        path = path.relative_to(sent)
    overrides = [part for word in sets for part in ("--set", word)]
    return TOOLS[tool](recipe, shlex.join([str(path), *overrides, "--resume"]))


def _install(recipe: Recipe) -> str:
    """What brings tunesmith, with the extras that the recipe takes."""
    bits = recipe.model.quantization is not None or any(stage.optim.endswith("8bit") for stage in recipe.stages)
    extras = ["deepspeed"] * (recipe.launch.strategy in ZERO) + ["quant"] * bits
    return f"pip install 'tunesmith[{','.join(extras)}]'" if extras else "pip install tunesmith"


def _torchrun(recipe: Recipe, run: str, meeting: str, nodes: str) -> str:
    words = f"--nnodes={nodes} --nproc_per_node={recipe.launch.nproc_per_node or 1} {meeting}"
    return f"env {PATIENCE}={WARNING_SECONDS} torchrun {words} -m tunesmith run {run}"


def _slurm(recipe: Recipe, run: str) -> str:
    launch = recipe.launch
    gpus = f"{launch.accelerator}:" if launch.accelerator else ""
    asked = [
        f"--job-name={recipe.name}",
        f"--nodes={launch.nodes}",
        "--ntasks-per-node=1",
        f"--gpus-per-node={gpus}{launch.nproc_per_node or 1}",
        f"--signal=TERM@{WARNING_SECONDS}",
        *([f"--time={launch.hours}:00:00"] if launch.hours else []),
    ]
    meeting = f'--rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$first:{PORT}"'
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {word}" for word in asked),
            "set -euo pipefail",
            'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            # What srun starts gets the signal, the batch shell does not.
            "srun " + _torchrun(recipe, run, meeting, '"$SLURM_JOB_NUM_NODES"'),
            "",
        ]
    )


def _sky(recipe: Recipe, run: str) -> str:
    launch = recipe.launch
    if launch.accelerator is None:
        raise RecipeError(
            "SkyPilot has to be told the kind of GPU", where="launch.accelerator", mend="name it: launch: {accelerator: H100}"
        )
    first = '$(echo "$SKYPILOT_NODE_IPS" | head -n1)'
    meeting = f'--node_rank="$SKYPILOT_NODE_RANK" --master_addr="{first}" --master_port={PORT}'
    limit = f"timeout --signal=TERM {launch.hours}h " if launch.hours else ""
    task = {
        "name": recipe.name,
        "workdir": ".",
        "num_nodes": launch.nodes,
        "resources": {"accelerators": f"{launch.accelerator}:{launch.nproc_per_node or 1}"},
        "setup": _install(recipe),
        "run": limit + _torchrun(recipe, run, meeting, '"$SKYPILOT_NUM_NODES"'),
    }
    return yaml.safe_dump(task, sort_keys=False, width=10_000)


def _dstack(recipe: Recipe, run: str) -> str:
    launch, count = recipe.launch, recipe.launch.nproc_per_node or 1
    meeting = f'--node_rank="$DSTACK_NODE_RANK" --master_addr="$DSTACK_MASTER_NODE_IP" --master_port={PORT}'
    task = {
        "type": "task",
        "name": recipe.name.lower().replace(".", "-").replace("_", "-"),
        "nodes": launch.nodes,
        "files": [f".:{FOLDER}"],
        "commands": [f"cd {FOLDER}", _install(recipe), _torchrun(recipe, run, meeting, '"$DSTACK_NODES_NUM"')],
        "resources": {"gpu": f"{launch.accelerator}:{count}" if launch.accelerator else count},
        **({"max_duration": f"{launch.hours}h"} if launch.hours else {}),
    }
    return yaml.safe_dump(task, sort_keys=False, width=10_000)


TOOLS: dict[str, Callable[[Recipe, str], str]] = {"slurm": _slurm, "sky": _sky, "dstack": _dstack}
