"""`clipwright launch`: the exact command lines, the job files for clusters, and how a group of nodes exits.

Launchers and ssh are stand-ins that record their arguments; test_hosts.py runs the real ones.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from waiting import wait_until

from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.folders import output
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.train.config import RunConfig
from clipwright.pipeline.train.config import identity as identity_of

NO_CHECK = "check=none"  # the data of these commands does not exist
TRAIN = ["train", "photos", "data.train=photos", "runtime.zero=2"]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`program(name, body)` puts a shell script on PATH that records its arguments, one per line, in NAME.log."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def make(name: str, body: str) -> Path:
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {tmp_path}/{name}.log\n{body}\n')
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def launcher(program: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`launcher(body)`: a stand-in for this Python, and so for the launchers that it would run."""
    return lambda body: monkeypatch.setattr("sys.executable", str(program("python", body)))


def hostfile(folder: Path, text: str) -> str:
    (folder / "hosts").write_text(text)
    return "hostfile=hosts"


def test_torchrun_command_line(tmp_path: Path, here: Any, launcher: Any) -> None:
    launcher("")
    arguments = ["launch", "torchrun", NO_CHECK, "processes=2", *TRAIN, "-o", "run", "--fresh"]
    shown = here(tmp_path, *arguments, "--dry-run").out.splitlines()
    assert shown[0] == "world size 2 = 1 node × 2 (by torchrun)"
    assert shown[1].startswith("OMP_NUM_THREADS=")
    assert shown[1].endswith(
        "-m torch.distributed.run --standalone --nproc-per-node=2 -m clipwright "
        "train photos data.train=photos runtime.zero=2 -o run --fresh"
    )
    assert not (tmp_path / "python.log").exists()
    here(tmp_path, *arguments)
    recorded = (tmp_path / "python.log").read_text().split()
    assert " ".join(recorded) == shown[1].split(" ", 2)[2]
    four_nodes = ["nodes=4", "node_rank=3", "master=node1", "port=4000"]
    line = json.loads(here(tmp_path, *arguments[:4], *four_nodes, *TRAIN, "--dry-run", "--json").out)["lines"][0]
    assert "--nnodes=4 --node-rank=3 --master-addr=node1 --master-port=4000 --nproc-per-node=2" in line
    assert "standalone" not in line


def test_hostfile_command_lines(
    tmp_path: Path, here: Any, program: Any, launcher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher("")
    program("ssh", 'shift 3; exec sh -c "$1"')
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth 0")
    file = hostfile(tmp_path, "# ours\nnode1 slots=2\n\nnode2  slots=2  # the new one\n")
    arguments = ["launch", "hostfile", NO_CHECK, file, "env.A=b c", *TRAIN, "data.note='it is'", "-o", "run"]
    shown = here(tmp_path, *arguments, "--dry-run").out.splitlines()
    assert shown[0] == "world size 4 = 2 nodes × 2 (from hosts), master node1:29500"
    assert [line.split("'")[0] for line in shown[1:]] == [f"ssh -o BatchMode=yes node{n} " for n in (1, 2)]
    assert not (tmp_path / "ssh.log").exists()
    here(tmp_path, *arguments)
    recorded = (tmp_path / "python.log").read_text().splitlines()
    starts = [recorded[i : i + 18] for i, argument in enumerate(recorded) if argument == "-u"]
    assert sorted(start[4] for start in starts) == ["--node_rank=0", "--node_rank=1"]
    world = json.loads(base64.urlsafe_b64decode(starts[0][3].removeprefix("--world_info=")))
    assert world == {"node1": [0, 1], "node2": [0, 1]} and list(world) == ["node1", "node2"]
    assert starts[0][1:3] == ["-m", "deepspeed.launcher.launch"]
    assert starts[0][5:] == [
        "--master_addr=node1",
        "--master_port=29500",
        "--no_local_rank",
        "--log_level=error",
        "--module",
        "clipwright",
        *TRAIN,
        "data.note='it is'",
        "-o",
        "run",
    ]
    remote = (tmp_path / "ssh.log").read_text()
    assert "'NCCL_SOCKET_IFNAME=eth 0'" in remote and "'A=b c'" in remote and f"cd {tmp_path} ||" in remote
    uneven = hostfile(tmp_path, "localhost slots=2\nnode2 slots=1\n")
    shown = here(
        tmp_path, "launch", "hostfile", NO_CHECK, uneven, "master=10.0.0.1", *TRAIN, "--dry-run"
    ).out.splitlines()
    assert shown[0] == "world size 3 on 2 nodes (2 + 1) (from hosts), master 10.0.0.1:29500"
    assert "ssh" not in shown[1] and shown[2].startswith("ssh")


def test_hostfile_lines_with_user_port_ipv6_comments_and_crlf(tmp_path: Path, here: Any) -> None:
    """The user and the port of ssh are not part of the address that the other ranks connect to."""
    lines = (
        "\ufeff# ours\r\namd00@192.168.1.10 slots=2\r\n\r\nnode2:2222\tslots=2 # new\r\nme@[2001:db8::1]:22 slots=1\r\n"
    )
    file = hostfile(tmp_path, lines + "fe80::2%eth0 slots=1\nme@localhost slots=1\n")
    shown = here(tmp_path, "launch", "hostfile", NO_CHECK, file, *TRAIN, "--dry-run").out.splitlines()
    assert shown[0] == "world size 7 on 5 nodes (2 + 2 + 1 + 1 + 1) (from hosts), master 192.168.1.10:29500"
    assert [line.split("'")[0] for line in shown[1:]] == [
        "ssh -o BatchMode=yes amd00@192.168.1.10 ",
        "ssh -o BatchMode=yes -p 2222 node2 ",
        "ssh -o BatchMode=yes -p 22 me@2001:db8::1 ",
        "ssh -o BatchMode=yes fe80::2%eth0 ",
        "ssh -o BatchMode=yes me@localhost ",  # as another user
    ]
    assert all("--master_addr=192.168.1.10 " in line and "@" not in line.split("--world_info")[1] for line in shown[1:])
    [encoded] = {line.split("--world_info=")[1].split()[0] for line in shown[1:]}
    world = json.loads(base64.urlsafe_b64decode(encoded))
    assert list(world) == ["192.168.1.10", "node2", "2001:db8::1", "fe80::2%eth0", "localhost"]
    file = hostfile(tmp_path, "2001:db8::1 slots=1\nnode2 slots=1\n")
    shown = here(tmp_path, "launch", "hostfile", NO_CHECK, file, *TRAIN, "--dry-run").out
    assert "master [2001:db8::1]:29500" in shown and "--master_addr=2001:db8::1 " in shown


@pytest.mark.parametrize(
    ("text", "where", "found"),
    [
        (None, "hosts", "the file does not exist"),
        ("", "hosts", "lists no host"),
        ("# node1 slots=2\n", "hosts", "lists no host"),
        ("node1 slots=2\nnode2\n", "hosts:2", "'node2'"),
        ("node1 slots=0\n", "hosts:1", "'node1 slots=0'"),
        ("node1 slots=two\n", "hosts:1", "'node1 slots=two'"),
        ("-oProxyCommand=x slots=2\n", "hosts:1", "ProxyCommand"),
        ("node1 slots=2\nnode2 slots=2\nnode1 slots=4\n", "hosts:3", "node1 is listed on an earlier line"),
        ("a@node1 slots=2\nb@NODE1:23 slots=2\n", "hosts:2", "NODE1 is listed on an earlier line"),
        ("node1:99999 slots=2\n", "hosts:1", "'node1:99999 slots=2'"),
        ("a:b:c slots=2\n", "hosts:1", "[USER@]HOST[:SSH_PORT] slots=NUMBER"),
        ("[node1]:22 slots=2\n", "hosts:1", "malformed"),
        ("@node1 slots=2\n", "hosts:1", "malformed"),
        ("a@-oProxyCommand=x slots=2\n", "hosts:1", "malformed"),
        ("me@::1 slots=2\nnode2 slots=2\n", "hosts", "the first host is ::1"),
        ("localhost slots=2\nnode2 slots=2\n", "hosts", "the first host is localhost"),
    ],
)
def test_invalid_hostfile_is_refused(
    text: str | None, where: str, found: str, tmp_path: Path, here: Any, launcher: Any
) -> None:
    launcher("")
    if text is not None:
        hostfile(tmp_path, text)
    error = here(tmp_path, "launch", "hostfile", NO_CHECK, "hostfile=hosts", *TRAIN, "-o", "run", code=3).error
    assert error.startswith("error[E_HOSTFILE]: ") and f" — {where} — " in error and found in error
    assert not (tmp_path / "python.log").exists()  # no rank was started, not even here


def test_commands_that_cannot_be_launched_are_refused(tmp_path: Path, here: Any) -> None:
    file = hostfile(tmp_path, "node1 slots=2\n")
    for arguments, code, text in (
        (["launch", "torchrun", "processes=2"], "E_USAGE", "no command"),
        (["launch", "torchrun", "processes=2", "prep", "table"], "E_USAGE", "'prep' cannot be launched in this way"),
        (["launch", "torchrun", "processes=2", "parts=2", "embed", "model=m"], "E_USAGE", "a Slurm array of parts"),
        (["launch", "slurm", "parts=2", *TRAIN], "E_USAGE", "'train'"),
        (["launch", "slurm", "prep", "table"], "E_CONFIG_VALUE", "parts is not set — launch by slurm"),
        (["launch", "slurm_array", "prep", "table", "runtime.part=1/2"], "E_USAGE", "leave out runtime.part"),
        (["launch", "slurm_array", "prep", "table", "--fresh"], "E_USAGE", "start over"),
        (["launch", "slurm", *TRAIN, "--fresh"], "E_USAGE", "start over each time it is queued again"),
        (["launch", "kubernetes", *TRAIN, "--fresh"], "E_USAGE", "name a new folder"),
        (["launch", "torchrun", *TRAIN], "E_CONFIG_VALUE", "processes is not set — launch by torchrun"),
        (["launch", "torchrun", "processes=2", "nodes=2", *TRAIN], "E_CONFIG_VALUE", "master"),
        (["launch", "hostfile", file, "nodes=3", *TRAIN], "E_CONFIG_VALUE", "node1 slots=2"),
        (["launch", "torchrn", *TRAIN], "E_CONFIG_FILE", "torchrun"),
        (["launch", "torchrun", "procesess=2", *TRAIN], "E_CONFIG_KEY", "processes"),
    ):
        error = here(tmp_path, *arguments, "-o", "run", code=2).error
        assert error.startswith(f"error[{code}]: ") and text in error, error
    error = here(tmp_path, "launch", "hostfile", *TRAIN, code=3).error
    assert (
        error.startswith("error[E_HOSTFILE]: no hostfile is given — ")
        and "[USER@]HOST[:SSH_PORT] slots=NUMBER" in error
    )


def test_error_of_the_first_failing_rank_is_the_last_line(
    tmp_path: Path, here: Any, program: Any, launcher: Any
) -> None:
    """node2's rank fails while node1 waits for it: both exit, and later output of the launchers is not printed."""
    launcher(
        "case $* in\n"
        "*node_rank=1*) echo loading >&2; echo 'error[E_BATCH]: a — b — c — d' >&2\n"
        "  echo 'error[E_NONFINITE]: e — f — g — h' >&2; echo Traceback >&2; exit 1;;\n"
        "*) sleep 3600 & trap 'echo gone >> out; kill $!; exit 1' TERM; wait;;\nesac"
    )
    program("ssh", 'shift 3; exec sh -c "$1"')
    file = hostfile(tmp_path, "node1 slots=1\nnode2 slots=1\n")
    done = here(tmp_path, "launch", "hostfile", NO_CHECK, file, *TRAIN, "-o", "run", code=2)  # E_BATCH's own
    assert done.err == "loading\nerror[E_BATCH]: a — b — c — d\n"
    assert (tmp_path / "out").read_text() == "gone\n"
    assert not (tmp_path / "run").exists()


def test_ranks_that_exit_without_an_error_are_named(tmp_path: Path, here: Any, program: Any, launcher: Any) -> None:
    launcher("exit 0")
    program("ssh", "echo 'ssh: no route to host' >&2; exit 255")
    file = hostfile(tmp_path, "node1 slots=1\nnode2 slots=1\n")
    error = here(tmp_path, "launch", "hostfile", NO_CHECK, file, *TRAIN, code=1).error
    what = "ranks exited with code 255 and without an error message"
    assert error.startswith(f"error[E_LAUNCH]: {what} — node")
    assert "last line: ssh: no route to host" in error and "ssh -o BatchMode=yes node" in error


def test_exit_code_that_a_launcher_loses_is_read_from_the_status_file(
    tmp_path: Path, here: Any, launcher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun exits with 1 for every failure; an older status file is not about this start."""
    monkeypatch.setattr("clipwright.pipeline.launch.run.STATUS_SECONDS", 0.3)
    run = tmp_path / "run"
    run.mkdir()
    arguments = ["launch", "torchrun", NO_CHECK, "processes=1", *TRAIN, "-o", "run"]
    status = '{"verb": "train", "exit_code": 85, "ended": "%s"}'
    (run / "status.json").write_text(status % "yesterday")
    launcher("echo boom >&2; exit 1")
    done = here(tmp_path, *arguments, code=1)
    assert done.error.startswith("error[E_LAUNCH]: ") and "last line: boom" in done.error
    launcher(f"echo '{status % 'now'}' > run/status.json; exit 1")
    done = here(tmp_path, *arguments, code=85)
    assert done.err.endswith("stopped by a signal: run the same command again to resume\n")
    # A rank was killed; rank 0 stopped only because torchrun then signaled the other ranks.
    launcher(f"echo '  exitcode  : -9 (pid: 7)' >&2; echo '{status % 'later'}' > run/status.json; exit 1")
    error = here(tmp_path, *arguments, code=1).error
    assert error.startswith("error[E_LAUNCH]: ") and "exited with code -9" in error
    launcher("exit 85")  # DeepSpeed's launcher keeps the code
    assert here(tmp_path, *arguments, code=85)


def test_a_signal_reaches_the_ranks_of_every_machine(
    tmp_path: Path, cli: Any, program: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM to `launch`: ranks started by ssh, which forwards no signals, save and exit too, with their exit code."""
    program("ssh", 'shift 3; exec sh -c "$1"')
    rank = program(
        "rank", "trap 'echo noise >&2; touch saved$$; exit 85' TERM; touch up$$; while :; do sleep 0.1; done"
    )
    (tmp_path / "start.py").write_text(
        f"import sys\nsys.executable = {str(rank)!r}\nfrom clipwright.cli import main\nmain()\n"
    )
    file = hostfile(tmp_path, "node1 slots=1\nnode2 slots=1\n")
    command = [sys.executable, "start.py", "launch", "hostfile", NO_CHECK, file, *TRAIN, "-o", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(list(tmp_path.glob("up*"))) == 2, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 85, stderr
    assert stderr.endswith("stopped by a signal: run the same command again to resume\n") and "noise" not in stderr
    assert len(list(tmp_path.glob("saved*"))) == 2


def test_slurm_script_runs_and_requeues(tmp_path: Path, here: Any, program: Any) -> None:
    options = ["nodes=4", "slurm.partition=big", "slurm.setup=[module load cuda]", "env.NCCL_DEBUG=WARN"]
    script = here(tmp_path, "launch", "slurm", NO_CHECK, *options, *TRAIN, "data.note=a b", "-o", "run").out
    for option in (
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--partition=big",
        "--signal=B:USR1@120",
        "--requeue",
        "--exclusive",
        "--open-mode=append",
        "--time=24:00:00",
    ):
        assert f"#SBATCH {option}\n" in script, option
    assert "--account" not in script and "\nmodule load cuda\n" in script and "export NCCL_DEBUG=WARN\n" in script
    assert "#SBATCH --gpus" not in here(tmp_path, "launch", "slurm", NO_CHECK, "gpus=false", *TRAIN).out
    (tmp_path / "job").write_text(script.replace("module load cuda", "true"))
    program("scontrol", "echo host1; echo host2")
    # Ranks that save on the warning before the time limit; ranks that save without it; ranks that fail.
    wait = "trap 'exit 85' USR1; touch up; while :; do sleep 0.05; done"
    for number, (body, warned, code) in enumerate(((wait, True, 85), ("exit 85", False, 85), ("exit 3", False, 3))):
        for name in ("srun", "scontrol"):
            (tmp_path / f"{name}.log").unlink(missing_ok=True)
        program("srun", f'echo "$MASTER_ADDR:$MASTER_PORT" > master\n{body}')
        job = subprocess.Popen(["bash", "job"], cwd=tmp_path, env={**os.environ, "SLURM_JOB_ID": "12001"})
        if warned:
            wait_until((tmp_path / "up").exists, job)
            job.send_signal(signal.SIGUSR1)
        assert job.wait() == code, number
        requeued = "requeue\n12001\n" in (tmp_path / "scontrol.log").read_text()
        assert requeued == warned, number
        assert (tmp_path / "master").read_text() == "host1:20001\n"
        recorded = (tmp_path / "srun.log").read_text().splitlines()
        command = ["clipwright", *TRAIN, "data.note=a b", "-o", "run"]
        assert recorded == ["--kill-on-bad-exit=1", "--cpus-per-task=8", *command]


JOB_START = """\
#!/bin/bash
#SBATCH --job-name=clipwright-{name}
#SBATCH --partition=big
#SBATCH --time=24:00:00
{options}
#SBATCH --cpus-per-task=8
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --requeue

module load cuda
srun --kill-on-bad-exit=1 --cpus-per-task=8 clipwright {command} &
step=$!
"""


def test_slurm_array_of_prep_runs(tmp_path: Path, here: Any, program: Any) -> None:
    """The jobs as sbatch receives them; then each job's own command, whose result is that of a single run."""
    prep = ["prep", "scenes", "source.count=8", "source.image_size=32", "shards.samples=2", "images.quality=85"]
    launch = ["launch", "slurm_array", "parts=2", "slurm.partition=big", "slurm.setup=[module load cuda]", *prep]
    script = here(tmp_path, *launch, "-o", "out").out
    assert here(tmp_path, *launch, "-o", "out", "--dry-run").out == script
    program("sbatch", 'n=$(ls job.* 2>/dev/null | wc -l); cat > job.$n; echo "10$n;main"')
    program("module", "true")
    submitted = subprocess.run(["bash"], input=script, cwd=tmp_path, text=True, capture_output=True, check=True)
    assert submitted.stdout == "plan: job 100;main\nparts: job 101;main\nfinish: job 102;main\n"
    assert (tmp_path / "sbatch.log").read_text().split() == [
        "--parsable",
        "--parsable",
        "--dependency=afterok:100",
        "--kill-on-invalid-dep=yes",
        "--parsable",
        "--dependency=afterok:101",
        "--kill-on-invalid-dep=yes",
    ]
    command = " ".join([*prep, "-o", "out"])
    one_task = "#SBATCH --ntasks=1\n#SBATCH --output=%x-%j.log"
    array = "#SBATCH --array=1-2\n#SBATCH --ntasks=1\n#SBATCH --output=%x-%A-%a.log"
    jobs = (("plan", one_task, "plan"), ("parts", array, '"$SLURM_ARRAY_TASK_ID/2"'), ("finish", one_task, "finish"))
    for number, (name, options, part) in enumerate(jobs):
        job = (tmp_path / f"job.{number}").read_text()
        start = JOB_START.format(name=f"prep-{name}", options=options, command=f"{command} runtime.part={part}")
        assert job.startswith(start), job
    program("srun", "exit 0")
    for number, task in ((0, ""), (1, "2"), (1, "1"), (2, "")):
        (tmp_path / "srun.log").unlink(missing_ok=True)
        env = {**os.environ, "SLURM_ARRAY_TASK_ID": task, "SLURM_JOB_ID": "1"}
        subprocess.run(["bash", f"job.{number}"], cwd=tmp_path, env=env, check=True)
        recorded = (tmp_path / "srun.log").read_text().splitlines()
        assert recorded[:3] == ["--kill-on-bad-exit=1", "--cpus-per-task=8", "clipwright"]
        here(tmp_path, *recorded[3:], "runtime.workers=1")
    here(tmp_path, *prep, "runtime.workers=1", "-o", "single")
    assert (tmp_path / "out/manifest.json").read_bytes() == (tmp_path / "single/manifest.json").read_bytes()


def test_slurm_array_of_embed(tmp_path: Path, here: Any) -> None:
    embed = ["embed", "model=m", "data=d", "-o", "out"]
    script = here(tmp_path, "launch", "slurm", NO_CHECK, "parts=8", *embed).out
    assert "plan" not in script and script.count("sbatch --parsable") == 2
    assert script.count("#SBATCH --gpus=1\n") == 2 and "#SBATCH --array=1-8\n" in script
    assert 'clipwright embed model=m data=d -o out runtime.part="$SLURM_ARRAY_TASK_ID/8" &' in script
    assert "gpus" not in here(tmp_path, "launch", "slurm", NO_CHECK, "parts=8", "gpus=false", *embed).out
    assert "parts" not in here(tmp_path, "launch", "slurm", NO_CHECK, *embed).out  # ranks of one job


def test_kubernetes_job(tmp_path: Path, here: Any) -> None:
    text = here(
        tmp_path, "launch", "kubernetes", NO_CHECK, "nodes=4", "kubernetes.image=ours:1", *TRAIN, "-o", "run"
    ).out
    service, job = yaml.safe_load_all(text)
    assert (service["kind"], service["spec"]["clusterIP"]) == ("Service", "None")
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    rules = spec["podFailurePolicy"]["rules"]
    assert [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in rules] == [
        ("Ignore", [85]),
        ("FailJob", [2, 3]),
        ("Ignore", None),
    ]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["subdomain"] == service["metadata"]["name"]
    assert spec["template"]["metadata"]["labels"] == service["spec"]["selector"]
    [container] = pod["containers"]
    assert {rule["onExitCodes"]["containerName"] for rule in rules[:2]} == {container["name"]}
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert container["command"][:2] == ["sh", "-c"]
    # The pod's command is itself a valid `clipwright launch`.
    inner = container["command"][2].removeprefix("exec clipwright ").replace("$JOB_COMPLETION_INDEX", "2").split()
    line = here(tmp_path, *inner[:2], NO_CHECK, *inner[2:], "--dry-run").out
    assert "world size 32 = 4 nodes × 8 (by torchrun), master clipwright-0.clipwright:29500" in line
    assert "--node-rank=2" in line
    _, single = yaml.safe_load_all(
        here(tmp_path, "launch", "kubernetes", NO_CHECK, "nodes=3", "processes=1", *TRAIN).out
    )
    [container] = single["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["clipwright", *TRAIN]
    env = {item["name"]: item["value"] for item in container["env"]}
    assert env == {"WORLD_SIZE": "3", "MASTER_ADDR": "clipwright-0.clipwright", "MASTER_PORT": "29500"}


def test_kubernetes_options_are_rendered_and_the_way_to_run_again_is_printed(tmp_path: Path, here: Any) -> None:
    options = {
        "name": "run-7",
        "claim": "disk",
        "mount": "/data",
        "shared_memory": "8Gi",
        "retries": "5",
        "grace": "300",
        "namespace": "ml-team",
        "node_selector": "{gpu: h100, spot: 'true'}",
        "tolerations": "[{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]",
        "secrets": "[bucket, hub]",
        "pull_secrets": "[registry]",
        "pull_policy": "IfNotPresent",
        "service_account": "trainer",
        "priority_class": "high",
        "gpu_resource": "amd.com/gpu",
        "cpus": "64",
        "memory": "512Gi",
        "volumes": "{photos: /photos}",
        "image": "ours: #1",
    }
    keys = [f"kubernetes.{name}={value}" for name, value in options.items()]
    done = here(tmp_path, "launch", "kubernetes", NO_CHECK, "nodes=2", "env.NCCL_DEBUG=no", *keys, *TRAIN)
    service, job = yaml.safe_load_all(done.out)
    assert service["metadata"] == job["metadata"] == {"name": "run-7", "namespace": "ml-team"}
    pod = job["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"gpu": "h100", "spot": "true"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert (pod["serviceAccountName"], pod["priorityClassName"]) == ("trainer", "high")
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert pod["volumes"] == [
        {"name": "work", "persistentVolumeClaim": {"claimName": "disk"}},
        {"name": "work-1", "persistentVolumeClaim": {"claimName": "photos"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
    ]
    assert (pod["terminationGracePeriodSeconds"], job["spec"]["backoffLimit"]) == (300, 10)  # 5 per pod
    [container] = pod["containers"]
    assert (container["image"], container["imagePullPolicy"]) == ("ours: #1", "IfNotPresent")
    assert container["envFrom"] == [{"secretRef": {"name": "bucket"}}, {"secretRef": {"name": "hub"}}]
    limits = {"memory": "512Gi", "amd.com/gpu": 8}
    assert container["resources"] == {"requests": {"cpu": "64", "memory": "512Gi"}, "limits": limits}
    assert container["volumeMounts"] == [
        {"name": "work", "mountPath": "/data"},
        {"name": "work-1", "mountPath": "/photos"},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    assert container["workingDir"] == "/data"
    assert {"name": "NCCL_DEBUG", "value": "no"} in container["env"]
    again = "kubectl delete job run-7 -n ml-team --ignore-not-found, then apply this again"
    assert again in done.err and again in done.out.splitlines()[0] and "&id" not in done.out
    # Nothing of this is in a plain job, and --quiet prints the job only.
    done = here(tmp_path, "launch", "kubernetes", NO_CHECK, "gpus=false", *TRAIN, "--quiet")
    _, job = yaml.safe_load_all(done.out)
    pod = job["spec"]["template"]["spec"]
    assert set(pod) == {"restartPolicy", "subdomain", "terminationGracePeriodSeconds", "containers", "volumes"}
    assert not {"resources", "envFrom", "imagePullPolicy"} & set(pod["containers"][0]) and done.err == ""
    assert "kubectl delete job clipwright --ignore-not-found" in done.out
    error = here(tmp_path, "launch", "kubernetes", "kubernetes.namespace=Ml_Team", *TRAIN, code=2).error
    assert error.startswith("error[E_CONFIG_VALUE]") and "kubernetes.namespace" in error


def test_options_of_a_slurm_job_and_the_address_of_rank_0(tmp_path: Path, here: Any) -> None:
    options = ["slurm.name=run-7", "slurm.account=lab", "slurm.time=02:00:00", "slurm.cpus_per_task=5"]
    options += ["slurm.warning=300", "master=10.0.0.1", "nodes=2", "processes=4"]
    script = here(tmp_path, "launch", "slurm", NO_CHECK, *options, *TRAIN).out
    lines = ["job-name=run-7", "account=lab", "time=02:00:00", "cpus-per-task=5", "signal=B:USR1@300"]
    lines += ["output=run-7-%j.log", "nodes=2", "ntasks-per-node=4", "gpus-per-node=4"]
    for line in lines:
        assert f"#SBATCH --{line}\n" in script, line
    assert "export MASTER_ADDR=10.0.0.1\n" in script and "srun --kill-on-bad-exit=1 --cpus-per-task=5 " in script
    text = here(tmp_path, "launch", "kubernetes", NO_CHECK, "master=10.0.0.1", "port=4000", "processes=1", *TRAIN).out
    [container] = list(yaml.safe_load_all(text))[1]["spec"]["template"]["spec"]["containers"]
    env = {item["name"]: item["value"] for item in container["env"]}
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("10.0.0.1", "4000")


def test_other_launchers_say_how_to_run_again(tmp_path: Path, here: Any, launcher: Any) -> None:
    done = here(tmp_path, "launch", "slurm", NO_CHECK, *TRAIN)
    assert "submit this with sbatch again. It resumes." in done.err and "\n# To run it again: submit" in done.out
    done = here(tmp_path, "launch", "slurm", NO_CHECK, "parts=2", "embed", "model=m", "data=d", "-o", "out")
    assert "run this with bash again" in done.err and done.out.startswith("#!/bin/bash\n# To run it again: run this")
    launcher("")
    out = here(tmp_path, "launch", "torchrun", NO_CHECK, "processes=1", *TRAIN).out
    assert "to run it again: the same command; it resumes\n" in out
    out = here(tmp_path, "launch", "torchrun", NO_CHECK, "processes=1", *TRAIN, "--fresh").out
    assert "it resumes without --fresh\n" in out


@pytest.fixture
def launchable(tmp_path: Path, scenes: Path) -> list[str]:
    (tmp_path / "data").symlink_to(scenes)
    (tmp_path / "model").mkdir()
    return ["train", "image.name=vit_nano", "data.train=data", "schedule.global_batch=16", "schedule.samples=960"]


@pytest.mark.parametrize(
    ("change", "code", "pieces"),
    [
        ([], "E_USAGE", ["no output folder is given", "clipwright train", "add -o DIR"]),
        (["optim.learning=1", "-o", "run"], "E_CONFIG_KEY", ["optim.learning"]),
        (["photo", "-o", "run"], "E_CONFIG_FILE", ["photo"]),
        (["photos", "more", "-o", "run"], "E_USAGE", ["unexpected argument 'more'"]),
        (["schedule.global_batch=15", "-o", "run"], "E_BATCH", ["world size 2", "use a multiple of 2"]),
        (["data.train=gone", "-o", "run"], "E_INPUT", ["gone", "no such folder", "check=config"]),
        (["data.train=model", "-o", "run"], "E_MANIFEST", ["model", "check=config"]),
        (["runtime.validation=gone", "-o", "run"], "E_INPUT", ["gone", "check=config"]),
        (["init_from=gone", "-o", "run"], "", ["gone"]),
        (["-o", "data"], "E_OUTPUT", ["data", "name a new folder"]),
        (["optim.lr=1", "-o", "older"], "E_RESUME", ["optim.lr: ", "older"]),
    ],
)
def test_command_that_its_ranks_would_refuse_is_refused_first(
    change: list[str],
    code: str,
    pieces: list[str],
    launchable: list[str],
    tmp_path: Path,
    here: Any,
) -> None:
    if "older" in change:
        older = resolve(RunConfig, overrides=[*launchable[1:], "precision=fp32"])
        (tmp_path / "older").mkdir()
        (tmp_path / "older" / "config.yaml").write_text(older.yaml())
        stored = identity_of(older, Dataset(tmp_path / "data").fingerprint, "t" * 64)
        output.record_identity(tmp_path / "older", output.RUN, stored)
    exit_code = 3 if code in ("E_INPUT", "E_MANIFEST", "") else 2
    done = here(tmp_path, "launch", "slurm", "processes=2", *launchable, *change, code=exit_code)
    assert done.out == "" and done.error.startswith(f"error[{code}")
    for piece in pieces:
        assert piece in done.error
    assert ("check=config" in done.error) == (exit_code == 3)
    assert not (tmp_path / "run").exists()


def test_check_can_be_limited_to_the_config_or_left_out(
    launchable: list[str], tmp_path: Path, here: Any, launcher: Any
) -> None:
    away = [*launchable, "data.train=/mnt/photos", "-o", "run"]
    assert "data.train=/mnt/photos" in here(tmp_path, "launch", "slurm", "check=config", *away).out
    assert "data.train=/mnt/photos" in here(tmp_path, "launch", "kubernetes", *away).out
    error = here(tmp_path, "launch", "slurm", "check=config", *away, "optim.learning=1", code=2).error
    assert error.startswith("error[E_CONFIG_KEY]")
    launcher("")
    for by in (["torchrun", "processes=2"], ["hostfile", hostfile(tmp_path, "node1 slots=2\n")]):
        error = here(tmp_path, "launch", *by, *away, code=3).error
        assert error.startswith("error[E_INPUT]") and "/mnt/photos" in error
    assert not (tmp_path / "python.log").exists()
    error = here(tmp_path, "launch", "slurm", "check=config", "processes=3", *away, code=2).error
    assert error.startswith("error[E_BATCH]") and "check=" not in error
    assert "optim.learning=1" in here(tmp_path, "launch", "slurm", "check=none", *away, "optim.learning=1").out
    for arguments, where in (
        (["slurm", "embed", "model=gone", "data=data", "-o", "out"], "gone"),
        (["slurm_array", "embed", "model=model", "data=data", "-o", "out"], "model"),
        (["slurm_array", "prep", "table", "source.path=gone", "-o", "out"], "source.path: gone"),
    ):
        error = here(tmp_path, "launch", *arguments, code=3).error
        assert f" — {where}" in error and "check=config" in error
    assert here(tmp_path, "launch", "slurm", "processes=2", "doctor").out
    assert here(tmp_path, "launch", "slurm", "processes=2", "doctor", *launchable[1:], "check=speed").out
    error = here(tmp_path, "launch", "slurm", "doctor", "optim.learning=1", "check=speed", code=2).error
    assert error.startswith("error[E_CONFIG_KEY]")


def test_container_image_copies_files_and_pins_that_exist() -> None:
    root = Path(__file__).resolve().parents[4]
    dockerfile = (root / "configs/launch/Dockerfile").read_text()
    copied = [name for line in dockerfile.splitlines() if line.startswith("COPY") for name in line.split()[1:-1]]
    assert {"pyproject.toml", "constraints", "clipwright", "configs"} < set(copied)
    assert [name for name in copied if not (root / name).exists()] == []
    linked = {path.name for path in (root / "clipwright").iterdir() if path.is_symlink()}
    assert linked <= set(copied)  # a link whose folder is not copied would be broken in the image
    compose = yaml.safe_load((root / "configs/launch/compose.yml").read_text())
    for service in compose["services"].values():
        assert (root / "configs/launch" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        pins = (root / "constraints" / f"{service['build']['args']['EXTRA']}.txt").read_text()
        assert f"faiss-{service['build']['args']['EXTRA']}==" in pins and "\ntorch==" in pins
    # A package that both install has the same version in both.
    cpu, gpu = (
        dict(line.split("==") for line in (root / f"constraints/{name}.txt").read_text().split() if "==" in line)
        for name in ("cpu", "gpu")
    )
    assert {name: version for name, version in gpu.items() if cpu.get(name, version) != version} == {}
