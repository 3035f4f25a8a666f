"""The manifests for Kubernetes: well-formed, restricted as they say, and about commands and files that there are."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from bus.server_certificate import checked_hosts
from resplit.cli import app

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
MANIFESTS = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "kustomization.yaml")
KUBERNETES = "1.32"
"""Whose schemas they are held against."""

Plain = dict[str, Any]


def documents() -> list[Plain]:
    return [document for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())]


def pods() -> Iterator[tuple[str, Plain]]:
    """Of each workload the name, and the pods that it makes."""
    for document in documents():
        if document["kind"] in {"Deployment", "DaemonSet", "StatefulSet"}:
            yield document["metadata"]["name"], document["spec"]["template"]["spec"]


def kustomization() -> Plain:
    found: Plain = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    return found


PODS = dict(pods())


def test_every_manifest_is_of_the_form_that_kubernetes_knows() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for document in documents():
        validate.validate(document, KUBERNETES, strict=True)
    wrong = documents()[0] | {"spec": {"finalisers": []}}
    with pytest.raises(validate.ValidationError):
        validate.validate(wrong, KUBERNETES, strict=True)


def test_every_manifest_is_applied() -> None:
    assert sorted(kustomization()["resources"]) == [path.name for path in MANIFESTS]
    assert set(PODS) == {"nats", "resplit-orchestrator", "resplit-agent", "resplit-gateway"}


@pytest.mark.parametrize("name", PODS)
def test_a_pod_is_restricted(name: str) -> None:
    pod = PODS[name]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in (*pod.get("initContainers", ()), *pod["containers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    kinds = {key for volume in pod["volumes"] for key in volume} - {"name"}
    assert kinds <= {"secret", "projected", "emptyDir", "persistentVolumeClaim"}, "the restricted standard's, no host's"


@pytest.mark.parametrize("name", PODS)
def test_a_pod_is_probed_and_mounts_what_it_has(name: str) -> None:
    pod = PODS[name]
    [container] = pod["containers"]
    assert {"readinessProbe", "livenessProbe"} <= container.keys() and "memory" in container["resources"]["limits"]
    mounted = {mount["name"] for one in (*pod.get("initContainers", ()), container) for mount in one["volumeMounts"]}
    asked = {volume["name"] for volume in pod["volumes"]}
    assert mounted - {"kept"} == asked
    environ = {variable["name"]: variable.get("value") for variable in container["env"]}
    if name != "nats":
        assert environ["RESPLIT_ALIVE"] == container["readinessProbe"]["exec"]["command"][-1]
        assert environ["RESPLIT_ALIVE"] in container["livenessProbe"]["exec"]["command"][-1]
        assert environ["RESPLIT_ALIVE"].rpartition("/")[0] in {one["mountPath"] for one in container["volumeMounts"]}


def test_the_liveness_probe_tells_a_file_that_changes_from_one_that_does_not(tmp_path: Path) -> None:
    for name in set(PODS) - {"nats"}:
        path = tmp_path / name
        shell = PODS[name]["containers"][0]["livenessProbe"]["exec"]["command"]
        command = [word.replace("/run/resplit/alive", str(path)) for word in shell]
        assert subprocess.run(command, check=False).returncode == 0, "not there yet"
        path.touch()
        assert subprocess.run(command, check=False).returncode == 0, "it lives"
        subprocess.run(["touch", "-d", "10 minutes ago", path], check=True)
        assert subprocess.run(command, check=False).returncode == 1, "it hangs"


def test_every_command_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for pod in PODS.values():
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            for one in container.get("env", ()):
                monkeypatch.setenv(one["name"], one.get("value", "a value of the node's"))
            for words in commands(container["command"]):
                seen.add(words[0])
                parse(words)
    assert seen == {"join", "agent", "orchestrator", "gateway"}


def commands(given: list[str]) -> Iterator[list[str]]:
    """The arguments of each call of `resplit`, in a shell's script or straight."""
    if given[0] != "sh":
        yield given[1:]
        return
    for part in given[-1].split("&&"):
        if found := re.match(r"\s*(?:exec )?resplit (.*)", part):
            plain = re.sub(r"\$\([^)]*\)", "node-1", found[1]).replace("$POD_IP", "10.0.0.11")
            yield shlex.split(plain.replace('"', ""))


def parse(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    command.commands[words[0]].make_context(words[0], list(words[1:]))


def test_a_command_that_is_none_is_found() -> None:
    with pytest.raises(Exception, match=r"[Nn]o such option"):
        parse(["orchestrator", "--keys", "k", "--stores", "s"])


def test_every_file_of_a_secret_that_is_asked_for_is_in_one() -> None:
    made = {
        secret["name"]: {path.rpartition("/")[2] for path in secret["files"]}
        for secret in kustomization()["secretGenerator"]
    }
    for pod in PODS.values():
        for volume in pod["volumes"]:
            if "secret" in volume:
                assert volume["secret"]["secretName"] in made
            for source in volume.get("projected", {}).get("sources", ()):
                assert {item["key"] for item in source["secret"]["items"]} == made[source["secret"]["name"]]
    asked = set(re.findall(r"/bundle/(\w+\.bundle)", str(PODS)))
    assert asked == made["resplit-orchestrator"] | made["resplit-gateway"]


def test_members_look_for_servers_by_names_that_certificates_can_have() -> None:
    for name, pod in PODS.items():
        [url] = [one["value"] for one in pod["containers"][0]["env"] if one["name"] == "RESPLIT_URL"] or [None]
        if name == "nats":
            assert url is None
            continue
        hosts = [one.removeprefix("nats://").removesuffix(":4222") for one in url.split(",")]
        assert hosts == ["nats-0.nats", "nats-1.nats", "nats-2.nats"] and set(hosts) <= set(checked_hosts(hosts))


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_puts_them_together_with_the_secrets(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER, tmp_path / "kubernetes", ignore=shutil.ignore_patterns("secrets")))
    for secret in kustomization()["secretGenerator"]:
        for name in secret["files"]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    assert len(built) == len(documents()) + len(kustomization()["secretGenerator"])
    assert {one["metadata"].get("namespace", "resplit") for one in built} == {"resplit"}
    images = set(re.findall(r"image: (\S+)", done.stdout))
    assert images == {"resplit:0.1.0"}
