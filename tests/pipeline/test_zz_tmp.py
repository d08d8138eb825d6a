"""The plan in a real control group: what the group does not leave, the machine does not have. Skipped where no group can be made."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tests.cli_tools import environment, row, write_rows
from transformers import LlamaConfig, LlamaForCausalLM

LIMIT = 1800 * 2**20  # bytes: full tuning of 100 million weights in fp32 takes more, LoRA less
MOUNT = Path("/sys/fs/cgroup")


@pytest.fixture
def group():
    """A group below this process's own, so that every limit there is stays in force."""
    try:
        listed = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
        own = MOUNT / "memory" / listed["memory"].strip("/") if "memory" in listed else MOUNT / listed[""].strip("/")
        made = own / f"tunesmith-test-{os.getpid()}"
        made.mkdir()
    except (OSError, KeyError) as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        limit = made / ("memory.limit_in_bytes" if "memory" in listed else "memory.max")
        try:
            limit.write_text(str(LIMIT))
        except OSError as error:
            pytest.skip(f"no limit of memory can be set in a control group here: {error}")
        yield made
    finally:
        for _ in range(50):  # a process that has ended leaves its group a moment later
            with contextlib.suppress(OSError):
                made.rmdir()
                break
            time.sleep(0.1)


def test_full_tuning_that_a_control_group_has_no_room_for_is_refused_with_what_fits_in_it(group, tiny_folder, tmp_path):
    config = LlamaConfig.from_pretrained(tiny_folder)
    wide = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 16}
    config.update(wide | {"head_dim": 64, "vocab_size": 49152})
    torch.set_default_dtype(torch.bfloat16)  # half the file
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(tmp_path / "model")
    for file in tiny_folder.glob("*token*"):
        (tmp_path / "model" / file.name).symlink_to(file)
    for file in tiny_folder.glob("*.jinja"):
        (tmp_path / "model" / file.name).symlink_to(file)
    recipe = {
        "name": "wide",
        "model": {"name": str(tmp_path / "model"), "dtype": "float32"},
        "data": {"train": str(write_rows(tmp_path / "rows.jsonl", map(row, range(16)))), "validation": 0.0},
        "stages": [{"name": "sft", "objective": "sft", "method": {"type": "full"}, "learning_rate": 1e-4, "max_steps": 2}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = (
        f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -c 'from tunesmith.cli import main; main()' plan {tmp_path}/recipe.yaml"
    )
    done = subprocess.run(["sh", "-c", words], env=environment(), capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    said = re.search(r"needs ([\d.]+) GB of memory, this machine has ([\d.]+) GB", done.stderr)
    named = re.search(r"nearest that fits, with ([\d.]+) GB: method: lora", done.stderr)
    assert said, done.stderr
    assert named, done.stderr
    (need, room), fits = map(float, said.groups()), float(named.group(1))
    assert fits < 0.9 * room + 0.01
    assert room < need
    assert room < LIMIT / 1e9 + 0.5  # libraries' files that others hold too are not the group's
