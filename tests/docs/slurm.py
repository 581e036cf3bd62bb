"""A stand-in for SLURM: sbatch, srun and scontrol that read the directives, set the variables and start processes.

Every task of an array, and every task of srun, is a process on this machine; node names are 127.0.0.1.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

JOB = "4711"


def sbatch(script: str) -> int:
    """Run all tasks of a job at once; the first exit code that is not 0."""
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", Path(script).read_text(), re.M))
    nodes = os.environ.get("NODES", directives.get("nodes", "1"))
    job = {"SLURM_JOB_ID": JOB, "SLURM_NNODES": nodes, "SLURM_JOB_NODELIST": "nodes", "SLURM_PROCID": "0"}
    tasks = [job]
    if "array" in directives:
        low, high = map(int, os.environ.get("ARRAY", directives["array"]).split("-"))
        common = {
            "SLURM_ARRAY_TASK_COUNT": str(high - low + 1),
            "SLURM_ARRAY_TASK_MIN": str(low),
            "SLURM_ARRAY_TASK_MAX": str(high),
            "SLURM_ARRAY_TASK_STEP": "1",
        }
        tasks = [job | common | {"SLURM_ARRAY_TASK_ID": str(task)} for task in range(low, high + 1)]
    return run_all(["bash", script], tasks)


def srun(arguments: list[str]) -> int:
    """One task on each node."""
    command = [word for word in arguments if word != "--ntasks-per-node=1"]
    count = os.environ["SLURM_NNODES"]
    common = {"SLURM_NTASKS": count, "SLURM_STEP_NUM_TASKS": count, "SLURM_LOCALID": "0"}
    return run_all(command, [common | {"SLURM_PROCID": str(task)} for task in range(int(count))])


def run_all(command: list[str], environments: list[dict[str, str]]) -> int:
    started = [subprocess.Popen(command, env=os.environ | environment) for environment in environments]
    return max((process.wait() for process in started), key=abs, default=0)


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    if name == "scontrol":
        print("127.0.0.1")
    sys.exit({"sbatch": lambda: sbatch(rest[0]), "srun": lambda: srun(rest), "scontrol": lambda: 0}[name]())
