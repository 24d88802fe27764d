"""Job files for clusters that start the ranks themselves: Slurm batch scripts and a Kubernetes Indexed Job."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

import yaml

from clipwright.pipeline.core.status import PREEMPTED
from clipwright.pipeline.launch.config import LaunchConfig
from clipwright.pipeline.launch.plan import required


def slurm_script(config: LaunchConfig, inner: list[str]) -> str:
    """Returns a batch script for `sbatch`: one task per rank, without another launcher, which would lose exit codes.

    The ranks save on the warning before the time limit; a job that saved (exit code 85) is queued again.
    """
    nodes, processes = required(config, "nodes", "processes")
    name = config.slurm.name
    options: dict[str, object] = {"nodes": nodes, "ntasks-per-node": processes}
    if config.gpus:
        options["gpus-per-node"] = processes
    options["output"] = f"{name}-%j.log"
    master_addr = shlex.quote(config.master) if config.master else '"$(scontrol show hostnames | head -n 1)"'
    lines = [
        *_header(config, name, options),
        "#SBATCH --exclusive",
        f"# {run_again(config)}",
        "",
        *_setup(config),
        f"export MASTER_ADDR={master_addr}",
        "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))",
        *_srun(config, f"clipwright {shlex.join(inner)}"),
    ]
    return "\n".join(lines)


def slurm_array_script(config: LaunchConfig, inner: list[str]) -> str:
    """Returns a script for `bash` that submits three dependent jobs: the plan (prep only), an array of parts, `finish`.

    Each job is one process. A part that is stopped resumes later; if submitted again, only missing parts do work.
    """
    [parts] = required(config, "parts")
    verb = inner[0]
    command = f"clipwright {shlex.join(inner)} runtime.part="
    one_task: dict[str, object] = {"ntasks": 1, "output": "%x-%j.log"}
    array: dict[str, object] = {"array": f"1-{parts}", "ntasks": 1, "output": "%x-%A-%a.log"}
    finish: dict[str, object] = dict(one_task)
    if config.gpus and verb == "embed":
        array["gpus"] = 1
        finish["gpus"] = 1
    jobs: list[tuple[str, dict[str, object], str]] = []
    if verb == "prep":
        jobs.append(("plan", one_task, f"{command}plan"))
    jobs.append(("parts", array, f'{command}"$SLURM_ARRAY_TASK_ID/{parts}"'))
    jobs.append(("finish", finish, f"{command}finish"))
    lines = ["#!/bin/bash", f"# {run_again(config)}", "set -eu"]
    previous = ""
    for name, options, line in jobs:
        dependency = ""
        if previous:
            # With several clusters, sbatch prints `JOB;CLUSTER`.
            dependency = f' --dependency="afterok:${{{previous}%%;*}}" --kill-on-invalid-dep=yes'
        header = _header(config, f"{config.slurm.name}-{verb}-{name}", options)
        lines += [
            "",
            f"{name}=$(sbatch --parsable{dependency} <<'JOB'",
            *header,
            "",
            *_setup(config),
            *_srun(config, line),
            "JOB",
            ")",
            f'echo "{name}: job ${name}"',
        ]
        previous = name
    return "\n".join(lines)


def _header(config: LaunchConfig, name: str, options: Mapping[str, object]) -> list[str]:
    """The `#SBATCH` lines: what the job requests from the cluster."""
    slurm = config.slurm
    requested = {
        "job-name": name,
        "account": slurm.account,
        "partition": slurm.partition,
        "time": slurm.time,
        **options,
        "cpus-per-task": slurm.cpus_per_task,
        "signal": f"B:USR1@{slurm.warning}",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{option}={value}" for option, value in requested.items() if value != ""]
    return ["#!/bin/bash", *lines, "#SBATCH --requeue"]


def _setup(config: LaunchConfig) -> list[str]:
    exports = [f"export {name}={shlex.quote(value)}" for name, value in config.env.items()]
    return [*config.slurm.setup, *exports]


def _srun(config: LaunchConfig, line: str) -> list[str]:
    """Runs `line` as the job's tasks; if they save on the warning before the time limit, the job is queued again."""
    return [
        f"srun --kill-on-bad-exit=1 --cpus-per-task={config.slurm.cpus_per_task} {line} &",
        "step=$!",
        "warned=no",
        "trap 'warned=yes; kill -USR1 $step' USR1",
        'wait "$step"; code=$?',
        "# The signal interrupted the wait, not the ranks: they are saving.",
        'if [ "$warned" = yes ]; then wait "$step"; code=$?; fi',
        f'if [ "$warned" = yes ] && [ "$code" = {PREEMPTED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
        'exit "$code"',
    ]


def kubernetes_manifest(config: LaunchConfig, inner: list[str]) -> str:
    """Returns a headless Service and an Indexed Job for `kubectl apply -f -`: one pod per node.

    A pod that saved (exit code 85) is started again and not counted as a failure; a refused config or input fails the
    job at once.
    """
    nodes, processes = required(config, "nodes", "processes")
    name, namespace = config.kubernetes.name, config.kubernetes.namespace
    metadata = {"name": name, **({"namespace": namespace} if namespace else {})}
    labels = {"app": name}
    rules = [
        {"action": "Ignore", "onExitCodes": {"containerName": "rank", "operator": "In", "values": [PREEMPTED]}},
        {"action": "FailJob", "onExitCodes": {"containerName": "rank", "operator": "In", "values": [2, 3]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
    ]
    job = {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        "backoffLimit": config.kubernetes.retries * nodes,  # if one pod fails, all fail
        "podFailurePolicy": {"rules": rules},
        "template": {"metadata": {"labels": labels}, "spec": _pod(config, inner, nodes, processes)},
    }
    # Pods look up each other's address while they start, before they are ready.
    service = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": labels}
    documents = [
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": service},
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job},
    ]
    text = yaml.dump_all(documents, Dumper=_NoAliases, sort_keys=False, width=1000).rstrip()
    return f"# {run_again(config)}\n{text}"


class _NoAliases(yaml.SafeDumper):
    """Writes an object that occurs twice in full: kubectl reads aliases, other readers of manifests may not."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def run_again(config: LaunchConfig) -> str:
    """Returns how to start a printed job again, as one line."""
    if config.by == "kubernetes":
        kubernetes = config.kubernetes
        namespace = f" -n {kubernetes.namespace}" if kubernetes.namespace else ""
        return (
            f"To run it again: kubectl delete job {kubernetes.name}{namespace} --ignore-not-found, then apply this "
            "again; a Job that has ended cannot be changed. Or give another kubernetes.name. It resumes."
        )
    if config.parts is not None:
        return "To run it again: run this with bash again. Parts that are finished do no work."
    return "To run it again: submit this with sbatch again. It resumes."


def _pod(config: LaunchConfig, inner: list[str], nodes: int, processes: int) -> dict[str, object]:
    """The spec of a pod: one rank, or torchrun with `processes` ranks."""
    kubernetes = config.kubernetes
    master_addr = config.master or f"{kubernetes.name}-0.{kubernetes.name}"
    env = {"MASTER_ADDR": master_addr, "MASTER_PORT": str(config.port), **config.env}
    if processes == 1:
        env["WORLD_SIZE"] = str(nodes)
        command = ["clipwright", *inner]
    else:
        launch = ["clipwright", "launch", "torchrun", f"processes={processes}", f"nodes={nodes}"]
        launch += [f"master={master_addr}", f"port={config.port}"]
        command = ["sh", "-c", f"exec {shlex.join(launch)} node_rank=$JOB_COMPLETION_INDEX {shlex.join(inner)}"]
    requests = {"cpu": kubernetes.cpus, "memory": kubernetes.memory}
    limits: dict[str, object] = {"memory": kubernetes.memory}
    if config.gpus:
        limits[kubernetes.gpu_resource] = processes
    resources = _filled({"requests": _filled(requests), "limits": _filled(limits)})
    claims = {kubernetes.claim: kubernetes.mount, **kubernetes.volumes}
    names = {claim: "work" if number == 0 else f"work-{number}" for number, claim in enumerate(claims)}
    mounts = [{"name": names[claim], "mountPath": path} for claim, path in claims.items()]
    volumes: list[dict[str, object]] = [
        {"name": name, "persistentVolumeClaim": {"claimName": claim}} for claim, name in names.items()
    ]
    container = {
        "name": "rank",
        "image": kubernetes.image,
        **_filled({"imagePullPolicy": kubernetes.pull_policy}),
        "command": command,
        "workingDir": kubernetes.mount,
        "env": [{"name": variable, "value": value} for variable, value in env.items()],
        **_filled({"envFrom": [{"secretRef": {"name": secret}} for secret in kubernetes.secrets]}),
        **_filled({"resources": resources}),
        "volumeMounts": [*mounts, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    optional = {
        "serviceAccountName": kubernetes.service_account,
        "priorityClassName": kubernetes.priority_class,
        "nodeSelector": kubernetes.node_selector,
        "tolerations": list(kubernetes.tolerations),
        "imagePullSecrets": [{"name": secret} for secret in kubernetes.pull_secrets],
    }
    return {
        "restartPolicy": "Never",
        "subdomain": kubernetes.name,
        "terminationGracePeriodSeconds": kubernetes.grace,
        **_filled(optional),
        "containers": [container],
        "volumes": [*volumes, {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": kubernetes.shared_memory}}],
    }


def _filled(values: Mapping[str, object]) -> dict[str, object]:
    """Returns the entries that are not empty."""
    return {name: value for name, value in values.items() if value}
