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
        **{"job-name": own.name, "account": own.account, "partition": own.partition, "time": own.time},
        **{"nodes": nodes, "ntasks-per-node": processes, "gpus-per-node": processes if config.gpus else ""},
        **{"cpus-per-task": own.cpus_per_task, "signal": f"B:USR1@{own.warning}"},
        **{"open-mode": "append", "output": f"{own.name}-%j.log"},
    }
    master = shlex.quote(config.master) if config.master else '"$(scontrol show hostnames | head -n 1)"'
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{name}={value}" for name, value in asked.items() if value != ""),
        "#SBATCH --exclusive",
        "#SBATCH --requeue",
        "",
        *own.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in config.env.items()),
        f"export MASTER_ADDR={master}",
        "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))",
        f"srun --kill-on-bad-exit=1 --cpus-per-task={own.cpus_per_task} clipwright {shlex.join(inner)} &",
        "step=$!",
        "again=no",
        "trap 'again=yes; kill -USR1 $step' USR1",
        'wait "$step"; code=$?',
        "# A signal ended the first wait, not the ranks: they are saving.",
        'if [ "$again" = yes ]; then wait "$step"; code=$?; fi',
        f'if [ "$again" = yes ] && [ "$code" = {PREEMPTED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
        'exit "$code"',
    ]
    return "\n".join(lines)


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
