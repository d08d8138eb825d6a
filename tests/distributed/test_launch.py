"""The recipe's `launch` section: torchrun is started with the user's words, and clusters get a file that their tools take."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess

import pytest
import yaml
from tests.cli_tools import call, environment, write_project
from tests.faults.harness import in_child
from tests.toys import model_folder
from torch.distributed.launcher import api

from tunesmith.errors import RecipeError
from tunesmith.launch import cluster_file, require_processes, start, starts_others
from tunesmith.preparation import require_files
from tunesmith.recipe import LaunchSection, load_recipe

LAUNCH = {"nodes": 2, "nproc_per_node": 8, "accelerator": "H100", "hours": 12, "strategy": "fsdp"}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe for two machines of eight GPUs, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return write_project(tmp_path, "owner/model", launch=LAUNCH)


def torchrun(command: str) -> list[str]:
    """torchrun's words, which end with ours, with the time for a checkpoint that Slurm leaves before its limit."""
    words = shlex.split(command)
    start = words.index("torchrun")
    assert words[start - 2 : start] == ["env", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300"]
    words = words[start:]
    assert words[words.index("-m") :][:3] == ["-m", "tunesmith", "run"]
    assert words[-1] == "--resume"
    assert "--nproc_per_node=8" in words
    return words


def test_the_slurm_file_is_a_script_that_starts_torchrun_once_on_each_machine(recipe):
    done = call("launch", recipe, "--print", "slurm")
    assert subprocess.run(["bash", "-n"], input=done.out, text=True, check=False).returncode == 0
    asked = [line.removeprefix("#SBATCH --") for line in done.out.splitlines() if line.startswith("#SBATCH")]
    assert {"nodes=2", "ntasks-per-node=1", "gpus-per-node=H100:8", "time=12:00:00", "signal=TERM@300", "job-name=tiny"} == set(asked)
    assert all(line.startswith("srun ") for line in done.out.splitlines() if "tunesmith" in line)  # the batch shell gets no signal
    words = torchrun(done.out.splitlines()[-2 if done.out.endswith("\n\n") else -1])
    assert {"--rdzv_backend=c10d", "--rdzv_id=$SLURM_JOB_ID", "--rdzv_endpoint=$first:29500", "--nnodes=$SLURM_JOB_NUM_NODES"} <= set(words)


def test_the_skypilot_task_has_the_fields_and_variables_that_skypilot_gives(recipe):
    task = yaml.safe_load(call("launch", recipe, "--print", "sky").out)
    assert (task["num_nodes"], task["resources"]) == (2, {"accelerators": "H100:8"})
    assert task.keys() <= {"name", "workdir", "num_nodes", "resources", "setup", "run"}
    assert task["run"].startswith("timeout --signal=TERM 12h env")
    words = torchrun(task["run"])
    assert {"--nnodes=$SKYPILOT_NUM_NODES", "--node_rank=$SKYPILOT_NODE_RANK"} <= set(words)


def test_the_dstack_task_has_the_fields_and_variables_that_dstack_gives(recipe):
    task = yaml.safe_load(call("launch", recipe, "--print", "dstack").out)
    assert (task["type"], task["nodes"], task["resources"], task["max_duration"]) == ("task", 2, {"gpu": "H100:8"}, "12h")
    assert task["files"] == [".:/tunesmith"]
    assert task["commands"][:2] == ["cd /tunesmith", "pip install tunesmith"]
    words = torchrun(task["commands"][-1])
    assert {"--nnodes=$DSTACK_NODES_NUM", "--node_rank=$DSTACK_NODE_RANK", "--master_addr=$DSTACK_MASTER_NODE_IP"} <= set(words)


@pytest.mark.parametrize(
    "asked, installed",
    [
        (["launch.strategy=zero3"], "pip install 'tunesmith[deepspeed]'"),
        (["stages.0.optim=adamw_8bit"], "pip install 'tunesmith[quant]'"),
        (["launch.strategy=ddp", "model.quantization=nf4"], "pip install 'tunesmith[quant]'"),
    ],
)
def test_a_cluster_installs_what_the_recipe_takes(recipe, asked, installed):
    assert yaml.safe_load(cluster_file(recipe, "sky", asked))["setup"] == installed
    assert installed in yaml.safe_load(cluster_file(recipe, "dstack", asked))["commands"]


def test_no_kind_of_gpu_is_asked_for_that_the_recipe_does_not_name(recipe):
    unnamed = ["launch.accelerator=null"]
    assert yaml.safe_load(cluster_file(recipe, "dstack", unnamed))["resources"] == {"gpu": 8}
    assert "--gpus-per-node=8\n" in cluster_file(recipe, "slurm", unnamed)
    with pytest.raises(RecipeError, match=r"launch\.accelerator[\s\S]*kind of GPU"):
        cluster_file(recipe, "sky", unnamed)


def command(tool: str, text: str) -> str:
    """The line of a file that starts torchrun."""
    if tool == "slurm":
        return text.splitlines()[-1]
    task = yaml.safe_load(text)
    return task["run"] if tool == "sky" else task["commands"][-1]


@pytest.mark.parametrize("tool", ["slurm", "sky", "dstack"])
def test_what_is_set_is_set_on_the_machines_too(recipe, tool):
    sets = ["seed=7", "task.description='it''s $HOME, isn''t it'"]
    words = torchrun(command(tool, cluster_file(recipe, tool, sets)))
    assert words[words.index("run") + 1 :] == [
        str(recipe) if tool == "slurm" else "tiny.yaml",
        "--set",
        sets[0],
        "--set",
        sets[1],
        "--resume",
    ]
    assert f"--set {sets[0]} --set" in call("launch", recipe, "--print", tool, "--set", sets[0], "--set", sets[1]).out


@pytest.mark.parametrize("tool", ["sky", "dstack"])
def test_a_recipe_outside_the_folder_that_is_sent_is_refused(recipe, tool, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(RecipeError, match="the recipe lies outside it"):
        cluster_file("../tiny.yaml", tool)
    assert "../tiny.yaml" in cluster_file("../tiny.yaml", "slurm")


def test_several_machines_and_several_processes_are_refused_where_they_cannot_be_had(recipe):
    with pytest.raises(RecipeError, match="2 machines, and this is one"):
        starts_others(load_recipe(recipe).launch)
    with pytest.raises(RecipeError, match="asks for 2 processes, and this is one"):
        require_processes(LaunchSection(nproc_per_node=2))
    assert not starts_others(LaunchSection())
    with pytest.raises(KeyError):
        cluster_file(recipe, "kubernetes")


def test_deepspeed_is_asked_for_before_anything_is_read_and_only_where_there_are_several_processes(recipe, monkeypatch):
    alone = ["launch.strategy=zero3", "launch.nodes=1", "launch.nproc_per_node=1"]
    several = [*alone[:2], "launch.nproc_per_node=2"]
    require_files(load_recipe(recipe, several))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    require_files(load_recipe(recipe, alone))
    for asked in (require_files, lambda recipe: start(recipe.launch, ["--version"])):
        with pytest.raises(RecipeError, match=r"zero3 needs DeepSpeed, which is not installed") as refused:
            asked(load_recipe(recipe, several))
        assert "pip install 'tunesmith[deepspeed]'" in str(refused.value)


@pytest.mark.parametrize(
    "asked, why",
    [
        (["model.dtype=float16"], "zero2 does not scale the loss of float16"),
        (["model.quantization=nf4"], "zero2 does not shard a quantised base"),
        (["stages.0.optim=adamw_8bit"], "stages.0.optim: with zero2 it is adamw_torch_fused"),
    ],
)
def test_what_deepspeed_does_not_do_is_refused(recipe, asked, why):
    with pytest.raises(RecipeError, match=why):
        load_recipe(recipe, ["launch.strategy=zero2", *asked])


def test_processes_started_here_have_as_long_for_a_checkpoint_when_they_are_told_to_stop(monkeypatch):
    class Agent(api.LocalElasticAgent):
        def run(self, role: str = "default"):
            raise InterruptedError(self._shutdown_timeout)

    monkeypatch.setattr(api, "LocalElasticAgent", Agent)
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with pytest.raises(InterruptedError) as seen:
        start(LaunchSection(nproc_per_node=1), ["--version"])
    assert seen.value.args == (300,)


def test_a_recipe_that_asks_for_two_processes_is_run_by_two_and_its_exit_status_is_theirs(tmp_path):
    recipe = write_project(tmp_path, model_folder(tmp_path / "model"), launch={"nproc_per_node": 2})
    words = ["run", recipe, "--json", "--gate", "--set", "evaluate.candidates=[zero_shot,tuned]"]
    words += ["--set", "evaluate.gates=[{metric: exact_match, better_than: zero_shot}]"]

    def command():
        os.chdir(tmp_path)
        os.environ.update(environment())
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(tmp_path / name, os.O_CREAT | os.O_WRONLY), stream)
        return call(*words).status

    assert in_child(command).result == 5, (tmp_path / "err").read_text()  # the verdict of two updates is not PASS
    path = tmp_path / "runs" / "tiny"
    assert json.loads((tmp_path / "out").read_text())["verdict"] in ("FAIL", "NOT MEASURED")
    assert yaml.safe_load((path / "recipe.yaml").read_text())["launch"]["processes"] == 2
    steps = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in steps if "loss" in event] == [1, 2]
    assert (path / "stages/sft/checkpoints/step-2/state.1.safetensors").is_file()
    assert call("run", recipe, "--out", path).status == 2  # in use, and no process was started for it
    assert start(LaunchSection(nproc_per_node=2), ["train", str(tmp_path / "no.yaml")]) == 2
