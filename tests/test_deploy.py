"""deploy/ without a cluster: manifests and script fit the schemas and our own command line."""

import copy
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from absl import flags

from bnresearch import __main__ as cli
from bnresearch import config as configs
from bnresearch import distributed, processes
from bnresearch.processes import Plan

DEPLOY = Path(__file__).parent.parent / "deploy"
SCRIPT = DEPLOY / "tpu_pod.sh"
# Of Kubernetes: the first in which all that the jobs use is stable, and the last with a schema.
VERSIONS = ("1.34", "1.37")
DEADLINE = 60

# What jobset.yaml uses of jobset.x-k8s.io/v1alpha2, after its source: jobset_types.go in
# github.com/kubernetes-sigs/jobset.
REASONS = ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded"]
RULE = {
    "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    "action": {"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    "onJobFailureReasons": {"type": "array", "items": {"enum": [*REASONS, "PodFailurePolicy"]}},
}


def closed(properties, *required):
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


JOBSET = closed(
    {
        "network": closed(
            {
                "enableDNSHostnames": {"type": "boolean"},
                "subdomain": {"type": "string"},
                "publishNotReadyAddresses": {"type": "boolean"},
            }
        ),
        "failurePolicy": closed(
            {
                "maxRestarts": {"type": "integer"},
                "rules": {"type": "array", "items": closed(RULE, "name", "action")},
            }
        ),
        "replicatedJobs": {
            "type": "array",
            "items": closed(
                {
                    "name": {"type": "string"},
                    "replicas": {"type": "integer"},
                    "template": {"type": "object"},
                },
                "name",
                "template",
            ),
        },
    },
    "replicatedJobs",
)


def read(name):
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text()))


def job_of(resource):
    """The Job that a resource is, or makes."""
    if resource["kind"] == "JobSet":
        (replicated,) = resource["spec"]["replicatedJobs"]
        return {"apiVersion": "batch/v1", "kind": "Job", **replicated["template"]}
    return resource


def check(resource, version=VERSIONS[-1]):
    """Raises ValidationError, also for a field that there is not."""
    if resource["kind"] == "JobSet":
        assert resource["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
        jsonschema.validate(resource["spec"], JOBSET)
    kubernetes_validate.validate(job_of(resource), version, strict=True)


JOBS = {name: read(name)[-1] for name in ("indexed_job.yaml", "jobset.yaml")}


def container(name):
    (found,) = job_of(JOBS[name])["spec"]["template"]["spec"]["containers"]
    return found


# ---- Schemas


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["storage.yaml", "indexed_job.yaml", "jobset.yaml"])
def test_manifests_fit_the_schema(name, version):
    assert {path.name for path in (DEPLOY / "kubernetes").iterdir()} == {"storage.yaml", *JOBS}
    for resource in read(name):
        check(resource, version)


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("completion",), 4, "'completion' was unexpected"),
        (("parallelism",), "four", "'four' is not of type"),
        (("podFailurePolicy", "rules", 0, "onExitCodes", "values"), ["2"], "'2' is not of type"),
        (("template", "spec", "gracePeriod"), 3, "'gracePeriod' was unexpected"),
        (("template", "spec", "containers", 0, "name"), None, "None is not of type"),
    ],
)
def test_a_mistake_in_a_manifest_is_found(name, path, value, message):
    resource = copy.deepcopy(JOBS[name])
    place = job_of(resource)["spec"]
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError, match=message):
        check(resource)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("failurePolicy", {"maxRestart": 3}, "'maxRestart' was unexpected"),
        ("failurePolicy", {"rules": [{"name": "a", "action": "Fail"}]}, "'Fail' is not one of"),
        ("suspended", True, "'suspended' was unexpected"),
    ],
)
def test_a_mistake_in_what_is_the_jobsets_own_is_found(key, value, message):
    resource = copy.deepcopy(JOBS["jobset.yaml"])
    resource["spec"][key] = value
    with pytest.raises(jsonschema.ValidationError, match=message):
        check(resource)


# ---- The command


def environment(name, **injected):
    """The variables that a container has, with those that whatever starts it adds."""
    return {entry["name"]: entry["value"] for entry in container(name)["env"]} | injected


def parsed(argv):
    """What our own command line makes of a command."""
    python, *start, verb = argv[:4]
    assert (python.rpartition("/")[2], start, verb) == ("python", ["-m", "bnresearch"], "train")
    given, values = ["bnresearch", *argv[4:]], flags.FlagValues()
    cli.VERBS[verb].define(given, values)
    return configs.parse_flags(given, values)


def parsed_container(name, variables):
    argv = container(name)["command"] + container(name)["args"]
    return parsed([re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], x) for x in argv])


@pytest.mark.parametrize("index", [0, 3])
def test_the_indexed_job_tells_each_process_which_it_is(index, monkeypatch):
    monkeypatch.chdir(DEPLOY.parent)
    service, job = read("indexed_job.yaml")
    variables = environment("indexed_job.yaml", JOB_COMPLETION_INDEX=str(index))
    values = parsed_container("indexed_job.yaml", variables)
    wanted = Plan(4, index, "bn-train-0.bn-train:12345", heartbeat=30, start=1800, stall=3600)
    assert processes.plan(values.config.distributed, variables) == wanted
    # The name of the coordinator: the pod of index 0 of this Job, in the domain of this Service.
    subdomain = job["spec"]["template"]["spec"]["subdomain"]
    assert wanted.coordinator.startswith(f"{job['metadata']['name']}-0.{subdomain}:")
    assert service["metadata"]["name"] == subdomain
    selected = {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert service["spec"]["selector"] == selected
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == wanted.processes


@pytest.mark.parametrize("index", ["0", "3"])
def test_in_the_jobset_jax_finds_which_process_it_is(index, monkeypatch):
    monkeypatch.chdir(DEPLOY.parent)
    jobset = JOBS["jobset.yaml"]
    spec = job_of(jobset)["spec"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    stem = f"{jobset['metadata']['name']}-{replicated['name']}-0"
    domain = jobset["spec"]["network"]["subdomain"]
    hosts = [f"{stem}-{i}.{domain}" for i in range(spec["completions"])]
    injected = {"TPU_WORKER_HOSTNAMES": ",".join(hosts), "TPU_WORKER_ID": index}
    variables = environment("jobset.yaml", **injected)
    values = parsed_container("jobset.yaml", variables)
    wanted = Plan(0, -1, f"{hosts[0]}:12345", heartbeat=30, start=1800, stall=3600)
    assert processes.plan(values.config.distributed, variables) == wanted
    assert len(hosts) == spec["parallelism"] == 4


@pytest.mark.parametrize(
    ("name", "resource", "devices"),
    [("indexed_job.yaml", "nvidia.com/gpu", 32), ("jobset.yaml", "google.com/tpu", 16)],
)
def test_batches_divide_over_the_devices(name, resource, devices, monkeypatch):
    monkeypatch.chdir(DEPLOY.parent)
    count = job_of(JOBS[name])["spec"]["completions"]
    assert count * container(name)["resources"]["limits"][resource] == devices
    data = parsed_container(name, {"JOB_COMPLETION_INDEX": "0"}).config.data
    assert (data.batch_size % devices, data.eval_batch_size % devices) == (0, 0)


@pytest.mark.parametrize("name", JOBS)
def test_what_follows_an_exit_code(name):
    spec = job_of(JOBS[name])["spec"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy takes no other
    found = {}
    for code in (1, 2, 3, 75, 137):
        rules = spec["podFailurePolicy"]["rules"]
        actions = [x["action"] for x in rules if code in x["onExitCodes"]["values"]]
        found[code] = actions[0] if actions else "Count"
        assert all(x["onExitCodes"]["containerName"] == container(name)["name"] for x in rules)
    assert found == {1: "Count", 2: "FailJob", 3: "FailJob", 75: "Ignore", 137: "Count"}
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= distributed.LIMITS[75]


@pytest.mark.parametrize("name", JOBS)
def test_volumes_are_claimed_and_mounted(name, monkeypatch):
    monkeypatch.chdir(DEPLOY.parent)
    spec = job_of(JOBS[name])["spec"]["template"]["spec"]
    claims = {item["metadata"]["name"] for item in read("storage.yaml")}
    volumes = {item["name"]: item for item in spec["volumes"]}
    used = {
        v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "emptyDir" not in v
    }
    assert used == claims
    paths = {item["name"]: item["mountPath"] for item in container(name)["volumeMounts"]}
    assert paths.keys() == volumes.keys()
    workdir = parsed_container(name, {"JOB_COMPLETION_INDEX": "0"}).workdir
    assert workdir.startswith(paths["runs"] + "/")
    assert environment(name)["TFDS_DATA_DIR"] == paths["data"]


def test_the_image_copies_what_there_is():
    text = (DEPLOY / "Dockerfile").read_text()
    sources = [
        x for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for x in line.split()
    ]
    assert {"pyproject.toml", "constraints.txt", "bnresearch", "configs"} <= set(sources)
    assert all((DEPLOY.parent / source).exists() for source in sources)


# ---- The script


def start(folder, *arguments, **variables):
    """Starts the script with the programs of ``folder``, so that gcloud can only be ours."""
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", SCRIPT, "my-slice", "us-west4-a", *arguments],
        cwd=folder,
        env={**os.environ, "PATH": path, "DRY_RUN": "", **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def call(folder, *arguments, **variables):
    """Its exit code, and what it printed."""
    with start(folder, *arguments, **variables) as process:
        try:
            out, err = process.communicate(timeout=DEADLINE)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(0o755)


@pytest.fixture
def host(tmp_path):
    """A folder whose gcloud carries a command out as host WORKER would, with a python that prints
    what it was called with."""
    program(tmp_path / "gcloud", 'printf "%s\\n" "${@:1:7}" >asked; bash -c "${8#--command=}"')
    endpoints = "${ENDPOINTS:-x:1:10.0.0.7,x:2:10.0.0.8,x:3:10.0.0.9,x:4:10.0.0.10}"
    text = (
        f'case "${{@: -1}}" in */agent-worker-number) echo "$WORKER";; *) echo "{endpoints}";; esac'
    )
    program(tmp_path / "curl", text)
    text = 'printf "%s\\n" "$0" "$@"; exit "${CODE:-0}"'
    program(tmp_path / "bnresearch" / ".venv" / "bin" / "python", text)
    return tmp_path


TRAIN = ("--config=configs/digits_mlp.py", "--workdir=runs/a b")


def test_a_dry_run_prints_the_command_and_runs_nothing(host):
    done = call(host, *TRAIN, DRY_RUN="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert not (host / "asked").exists()
    again = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {done.stdout}"],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    command = again.stdout.split("\0")[:-1]
    start = "gcloud compute tpus tpu-vm ssh my-slice --zone=us-west4-a --worker=all"
    assert " ".join(command[:-1]) == start
    assert command[-1].startswith("--command=bash -c ")


@pytest.mark.parametrize("endpoints", ["", "10.0.0.7,10.0.0.8,10.0.0.9,10.0.0.10"])
@pytest.mark.parametrize("worker", [0, 3])
def test_each_host_of_a_slice_runs_the_same_entry_point(host, worker, endpoints, monkeypatch):
    done = call(host, *TRAIN, WORKER=str(worker), ENDPOINTS=endpoints)
    assert (done.returncode, done.stderr) == (0, "")
    asked = (host / "asked").read_text().split("\n")[:-1]
    wanted = "compute tpus tpu-vm ssh my-slice --zone=us-west4-a --worker=all"
    assert asked == wanted.split()
    monkeypatch.chdir(DEPLOY.parent)
    values = parsed(done.stdout.split("\n")[:-1])
    assert values.workdir == "runs/a b"
    wanted = Plan(4, worker, "10.0.0.7:12345", heartbeat=30, start=120, stall=3600)
    assert processes.plan(values.config.distributed, {}) == wanted


@pytest.mark.parametrize("code", [2, 75])
def test_the_exit_code_is_that_of_the_run(host, code):
    assert call(host, *TRAIN, WORKER="0", CODE=str(code)).returncode == code


def test_a_host_that_does_not_know_the_others_starts_nothing(host):
    program(host / "curl", "echo 'curl: (6) Could not resolve host' >&2; exit 6")
    done = call(host, *TRAIN)
    assert (done.returncode, done.stdout) == (6, "")
    assert not (host / "bnresearch" / "tpu_pod.log").exists()


def test_a_run_that_goes_on_is_not_started_twice_and_can_be_stopped(host, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # that of the user's terminal
    assert call(host, "stop").returncode == 0  # there is none
    wait = [sys.executable, "-c", "import time; time.sleep(60)", "bnresearch train"]
    with subprocess.Popen(wait) as run:
        try:
            (host / "bnresearch" / "tpu_pod.pid").write_text(f"{run.pid}\n")
            second = call(host, *TRAIN, WORKER="0")
            assert second.returncode == 2
            assert "a run is going on" in second.stderr
            assert run.poll() is None
            with start(host, "stop") as stop:
                assert run.wait(DEADLINE) == -signal.SIGTERM
                assert stop.wait(DEADLINE) == 0
        finally:
            run.kill()


def test_too_few_arguments_are_refused(host):
    done = call(host)
    assert done.returncode == 2
    assert "deploy/tpu_pod.sh NAME ZONE --config=FILE --workdir=DIR" in done.stderr
    assert not (host / "asked").exists()


def test_shellcheck_finds_nothing():
    checker = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    done = subprocess.run([checker, SCRIPT], capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stdout) == (0, "")
