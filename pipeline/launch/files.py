"""Job files of clusters that start the ranks themselves: a Slurm batch script, a Kubernetes Indexed Job."""

from __future__ import annotations

import shlex

import yaml

from clipwright.pipeline.core.command import PREEMPTED
from clipwright.pipeline.launch.plan import LaunchConfig, required


def slurm(config: LaunchConfig, inner: list[str]) -> str:
    """A batch script for `sbatch`: one task a rank and no launcher between, so that exit codes survive.

    At the time limit's warning the ranks save; a job that saved (exit code 85) queues again.
    """
    nodes, processes = required(config, "nodes", "processes")
    own = config.slurm
    asked = {
        **{"nodes": nodes, "ntasks-per-node": processes, "gpus-per-node": processes if config.gpus else ""},
        "output": f"{own.name}-%j.log",
    }
    master = shlex.quote(config.master) if config.master else '"$(scontrol show hostnames | head -n 1)"'
    lines = [
        *_asked(config, own.name, asked),
        "#SBATCH --exclusive",
        "",
        *_ready(config),
        f"export MASTER_ADDR={master}",
        "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))",
        *_again(config, f"clipwright {shlex.join(inner)}"),
    ]
    return "\n".join(lines)


def array(config: LaunchConfig, inner: list[str]) -> str:
    """A script for `bash` that submits a plan (of prep), an array of parts behind it and, behind them, what joins them.

    Each job is one process. A part that is told to stop goes on later; submitted again, only missing parts work.
    """
    [parts] = required(config, "parts")
    own, verb = config.slurm, inner[0]
    gpu = {"gpus": 1 if config.gpus and verb == "embed" else ""}
    told = f"clipwright {shlex.join(inner)} runtime.part="
    one, each = {"ntasks": 1, "output": "%x-%j.log"}, {"ntasks": 1, "output": "%x-%A-%a.log"}
    jobs = [("plan", one, f"{told}plan")] if verb == "prep" else []
    jobs.append(("parts", {"array": f"1-{parts}", **each, **gpu}, f'{told}"$SLURM_ARRAY_TASK_ID/{parts}"'))
    jobs.append(("finish", {**one, **gpu}, f"{told}finish"))
    lines = ["#!/bin/bash", "set -eu"]
    before = ""
    for name, asked, line in jobs:
        # Of several clusters, sbatch names the one behind a semicolon.
        wait = f' --dependency="afterok:${{{before}%%;*}}" --kill-on-invalid-dep=yes' if before else ""
        script = [*_asked(config, f"{own.name}-{verb}-{name}", asked), "", *_ready(config), *_again(config, line)]
        lines += ["", f"{name}=$(sbatch --parsable{wait} <<'JOB'", *script, "JOB", ")", f'echo "{name}: job ${name}"']
        before = name
    return "\n".join(lines)


def _asked(config: LaunchConfig, name: str, asked: dict[str, object]) -> list[str]:
    """The head of a batch script: what it asks of the cluster."""
    own = config.slurm
    asked = {
        **{"job-name": name, "account": own.account, "partition": own.partition, "time": own.time, **asked},
        **{"cpus-per-task": own.cpus_per_task, "signal": f"B:USR1@{own.warning}", "open-mode": "append"},
    }
    lines = [f"#SBATCH --{option}={value}" for option, value in asked.items() if value != ""]
    return ["#!/bin/bash", *lines, "#SBATCH --requeue"]


def _ready(config: LaunchConfig) -> list[str]:
    return [*config.slurm.setup, *(f"export {name}={shlex.quote(value)}" for name, value in config.env.items())]


def _again(config: LaunchConfig, line: str) -> list[str]:
    """Runs `line` as the job's tasks; warned of the time limit, they save, and the job queues again."""
    return [
        f"srun --kill-on-bad-exit=1 --cpus-per-task={config.slurm.cpus_per_task} {line} &",
        "step=$!",
        "again=no",
        "trap 'again=yes; kill -USR1 $step' USR1",
        'wait "$step"; code=$?',
        "# A signal ended the first wait, not the ranks: they are saving.",
        'if [ "$again" = yes ]; then wait "$step"; code=$?; fi',
        f'if [ "$again" = yes ] && [ "$code" = {PREEMPTED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
        'exit "$code"',
    ]


def kubernetes(config: LaunchConfig, inner: list[str]) -> str:
    """A headless Service and an Indexed Job for `kubectl apply -f -`: a pod a machine, found by its index.

    Exit code 85 (state saved) starts a pod anew and is not counted; a refused config or input ends the job at once.
    """
    nodes, processes = required(config, "nodes", "processes")
    own = config.kubernetes
    labels = {"app": own.name}
    master = config.master or f"{own.name}-0.{own.name}"
    env = {"MASTER_ADDR": master, "MASTER_PORT": str(config.port), **config.env}
    if processes == 1:  # the pod is the rank
        env["WORLD_SIZE"] = str(nodes)
        command = ["clipwright", *inner]
    else:
        words = ["clipwright", "launch", "torchrun", f"processes={processes}", f"nodes={nodes}", f"master={master}"]
        words += [f"port={config.port}"]
        command = ["sh", "-c", f"exec {shlex.join(words)} node_rank=$JOB_COMPLETION_INDEX {shlex.join(inner)}"]
    container = {
        **{"name": "rank", "image": own.image, "command": command, "workingDir": own.mount},
        "env": [{"name": name, "value": value} for name, value in env.items()],
        "resources": {"limits": {"nvidia.com/gpu": processes}} if config.gpus else {},
        "volumeMounts": [{"name": "work", "mountPath": own.mount}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    pod = {
        **{"restartPolicy": "Never", "subdomain": own.name, "terminationGracePeriodSeconds": own.grace},
        "containers": [container],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": own.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": own.shared_memory}},
        ],
    }
    saved = {"containerName": "rank", "operator": "In", "values": [PREEMPTED]}
    refused = {"containerName": "rank", "operator": "In", "values": [2, 3]}
    rules = [
        {"action": "Ignore", "onExitCodes": saved},
        {"action": "FailJob", "onExitCodes": refused},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
    ]
    job = {
        **{"completionMode": "Indexed", "completions": nodes, "parallelism": nodes},
        # A failure of one pod is the failure of all.
        **{"backoffLimit": own.retries * nodes, "podFailurePolicy": {"rules": rules}},
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    # Pods look each other up while they start, before they are ready.
    service = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": labels}
    documents = [
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": own.name}, "spec": service},
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": own.name}, "spec": job},
    ]
    return yaml.safe_dump_all(documents, sort_keys=False, width=1000).rstrip()
