"""The files in deploy/: linters accept them, they agree with each other and the command line, and what they start works."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import run_cli
from serving_cases import encoded, png, running
from torch.distributed.run import get_args_parser

from mopefuse.serving.http.middleware import OPEN_PATHS
from mopefuse.serving.ray_settings import read_settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
SERVER: dict[str, Any] = COMPOSE["services"]["server"]
KUBERNETES: dict[str, Any] = {
    one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")) if one
}
POD: dict[str, Any] = KUBERNETES["Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
YAML_STYLE = "{extends: default, rules: {line-length: {max: 128}, document-start: disable}}"


def instruction(name: str) -> Any:
    """The arguments of the last instruction of a name in the Dockerfile."""
    (*_, last) = re.findall(rf"^{name} +(.*)$", DOCKERFILE, re.MULTILINE)
    return ast.literal_eval(last) if last.startswith("[") else last


COMMANDS = {
    "Dockerfile": instruction("ENTRYPOINT")[2:] + instruction("CMD"),
    "compose": SERVER["command"],
    "kubernetes": CONTAINER["args"],
}


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # those of Ray


@pytest.mark.parametrize(
    "command",
    [
        ("hadolint", "--failure-threshold", "info", "Dockerfile"),
        ("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"),
        ("kubernetes-validate", "--strict", "kubernetes.yaml", "kubernetes-train.yaml"),
        ("yamllint", "--strict", "-d", YAML_STYLE, "compose.yaml", "kubernetes.yaml", "kubernetes-train.yaml"),
    ],
    ids=lambda command: str(command[0]),
)
def test_its_linter_accepts_it(command: tuple[str, ...]) -> None:
    program = Path(sys.executable).parent / command[0]
    done = subprocess.run([program, *command[1:]], cwd=DEPLOY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def flags() -> set[str]:
    return set(re.findall(r"--[a-z-]+", run_cli("serve", "--help").stdout))


def test_the_job_that_trains_has_flags_that_exist() -> None:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes-train.yaml").read_text(encoding="utf-8"))
    job = next(one for one in documents if one and one["kind"] == "Job")
    pod = job["spec"]["template"]["spec"]
    args = pod["containers"][0]["args"]
    ours = args.index("mopefuse")
    known = set(re.findall(r"--[a-z-]+", run_cli("train", "--help").stdout))
    assert {arg.partition("=")[0] for arg in args[ours + 2 :]} <= known
    known = {name for action in get_args_parser()._actions for name in action.option_strings}
    assert {arg.partition("=")[0] for arg in args[: ours - 1]} <= known
    first = f"{job['metadata']['name']}-0.{pod['subdomain']}:{pod['containers'][0]['ports'][0]['containerPort']}"
    assert f"--rdzv-endpoint={first}" in args


@pytest.mark.parametrize("file", COMMANDS)
def test_every_flag_exists(file: str, flags: set[str]) -> None:
    assert {word for word in COMMANDS[file] if word.startswith("--")} <= flags


def test_ports_agree() -> None:
    port = option(COMMANDS["Dockerfile"], "--port")
    assert port == instruction("EXPOSE") and f":{port}/health" in DOCKERFILE
    assert [one.rpartition(":")[2] for one in SERVER["ports"]] == [port]
    assert f":{port}/ready" in SERVER["healthcheck"]["test"][-1]
    names = {one["name"]: str(one["containerPort"]) for one in CONTAINER["ports"]}
    probes = [CONTAINER[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")]
    assert {names[probe["port"]] for probe in probes} == {port}
    assert names[KUBERNETES["Service"]["spec"]["ports"][0]["targetPort"]] == port
    assert {probe["path"] for probe in probes} == {"/ready", "/health"} <= set(OPEN_PATHS), "probes have no key"


def test_models_are_mounted_read_only_where_they_are_looked_for() -> None:
    assert {option(command, "--adapters") for command in COMMANDS.values()} == {"/models"}
    (models,) = [one for one in SERVER["volumes"] if isinstance(one, dict)]
    assert models["target"] == "/models" and models["read_only"]
    mounts = {one["mountPath"]: one for one in CONTAINER["volumeMounts"]}
    assert mounts["/models"]["readOnly"] and {"/cache", "/tmp"} <= mounts.keys()
    assert {one["name"] for one in mounts.values()} == {one["name"] for one in POD["volumes"]}
    assert "XDG_CACHE_HOME=/cache" in DOCKERFILE and "cache:/cache" in SERVER["volumes"]


def test_nothing_runs_as_root_or_writes_to_its_root() -> None:
    user = instruction("USER")
    assert DOCKERFILE.count(f"\nUSER {user}\n") == 2 and f"--uid {user} " in DOCKERFILE
    assert POD["securityContext"]["runAsUser"] == int(user) and POD["securityContext"]["runAsNonRoot"]
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"] and SERVER["read_only"]
    assert CONTAINER["securityContext"]["capabilities"]["drop"] == SERVER["cap_drop"] == ["ALL"]


def test_the_key_comes_from_the_environment() -> None:
    (variable,) = CONTAINER["env"]
    assert variable["name"] == "MOPEFUSE_API_KEY" and "secretKeyRef" in variable["valueFrom"]
    assert SERVER["environment"]["MOPEFUSE_API_KEY"].startswith("${MOPEFUSE_API_KEY:?")


def test_accepted_requests_have_the_time_to_be_answered() -> None:
    drain = float(option(COMMANDS["compose"], "--drain-timeout"))
    assert float(SERVER["stop_grace_period"].removesuffix("s")) > drain
    drain = float(option(COMMANDS["kubernetes"], "--drain-timeout"))
    pause = float(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["terminationGracePeriodSeconds"] > drain + pause
    assert KUBERNETES["Deployment"]["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_threads_are_those_that_the_limits_allow() -> None:
    assert option(COMMANDS["compose"], "--threads") == SERVER["deploy"]["resources"]["limits"]["cpus"]
    assert option(COMMANDS["kubernetes"], "--threads") == CONTAINER["resources"]["limits"]["cpu"]


def test_objects_of_kubernetes_refer_to_each_other() -> None:
    labels = KUBERNETES["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    assert KUBERNETES["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels
    assert KUBERNETES["Service"]["spec"]["selector"].items() <= labels
    assert KUBERNETES["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items() <= labels
    target = KUBERNETES["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", KUBERNETES["Deployment"]["metadata"]["name"])


def test_what_is_installed_is_what_the_project_declares() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    (python,) = re.findall(r"^ARG PYTHON=(.*)$", DOCKERFILE, re.MULTILINE)
    assert f'"{python}"' in workflow
    extras = PROJECT["optional-dependencies"]
    assert all(extra in extras for extra in re.findall(r"/src\[([\w,]+)\]", DOCKERFILE)[0].split(","))
    slim, full = (part for part in DOCKERFILE.split("FROM base AS ")[1:])
    declared = {*PROJECT["dependencies"], *extras["serve"], *extras["runtime"]}
    installed = set(re.findall(r'"([\w-]+>=[\d.]+)"', slim))
    assert installed <= declared and {*extras["serve"], *extras["runtime"]} <= installed
    assert set(re.findall(r'"([\w-]+>=[\d.]+)"', full)) <= declared
    assert SERVER["build"]["target"] in ("torch", "onnx") and (DEPLOY / SERVER["build"]["context"]).resolve() == ROOT
    allowed = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert allowed == {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "mopefuse", "recipes"}


def test_metrics_and_flags_in_the_documentation_exist() -> None:
    page = (ROOT / "docs" / "how-to" / "deploy.md").read_text(encoding="utf-8")
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "mopefuse" / "serving").rglob("*.py"))
    metrics = {name.removesuffix("_total").removeprefix("mopefuse_") for name in re.findall(r"`(mopefuse_\w+)", page)}
    assert len(metrics) > 8
    assert {name for name in metrics if f'"{name}"' not in code and f'"mopefuse_{name}"' not in code} == set()
    known = set(re.findall(r"--[a-z-]+", run_cli("serve", "--help").stdout))
    of_others = {"--target", "--rm", "--gpus", "--build", "--from-literal", "--models", "--seconds"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page)) <= known | of_others


def test_the_cluster_in_the_documentation_is_valid() -> None:
    page = (ROOT / "docs" / "how-to" / "deploy.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    config = yaml.safe_load(block)
    schema = pytest.importorskip("ray.serve.schema")
    (application,) = schema.ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "mopefuse.serving.ray:app"
    assert read_settings(application.args, "the page").num_gpus == 1


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with what the target onnx installs."""
    environment = tmp_path_factory.mktemp("slim") / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    (stage,) = re.findall(r"FROM base AS onnx\n(.*?)\nUSER", DOCKERFILE, re.DOTALL)
    for words in re.findall(r"pip (install [^&]*)", stage):
        given = [word.strip('"').replace("/src", str(ROOT)) for word in words.split() if word != "--no-cache-dir"]
        done = subprocess.run([environment / "bin" / "pip", *given, "-q"], capture_output=True, text=True, check=False)
        if done.returncode and "No matching distribution" in done.stderr:
            pytest.skip("the package index cannot be reached")
        assert done.returncode == 0, done.stderr
    return environment / "bin"


@pytest.mark.process
def test_the_slim_image_serves_bundles_and_ends_on_sigterm(slim: Path, exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "models" / "mine")
    here = {"/models": str(tmp_path / "models"), "0.0.0.0": "127.0.0.1", "8000": "0", "mopefuse": str(slim / "mopefuse")}
    command = [here.get(word, word) for word in instruction("ENTRYPOINT") + instruction("CMD")]
    with running(command, XDG_CACHE_HOME=str(tmp_path / "cache"), PYTHONPATH="", PATH=os.environ["PATH"]) as server:
        server.wait_until_ready()
        check = re.findall(r"HEALTHCHECK .*?CMD (\[.*\])", DOCKERFILE)[0].replace("8000", str(server.port))
        subprocess.run([slim / "python", *ast.literal_eval(check)[1:]], check=True)
        response = server.post(model="mine", image=encoded(png()), text="what is the red digit", top=1)
        assert (response.status_code, len(response.json()["probabilities"])) == (200, 1), response.text
        assert server.stop() == 0
        assert any(json.loads(line).get("path") == "/predict" for line in server.lines if line.startswith("{"))
    assert list(slim.parent.glob("lib/*/site-packages/onnxruntime")) and not list(slim.parent.glob("lib/*/site-packages/torch"))
