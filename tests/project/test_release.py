"""What a release is made with: the citation, the workflows and the Docker file are well-formed and true."""

import fnmatch
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import dockerfile
import pytest
import yaml
from conftest import ROOT

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SCHEMAS = {"CITATION.cff": "vendor.citation-file-format"}
SCHEMAS |= {f".github/workflows/{name}.yml": "vendor.github-workflows" for name in ("test", "release")}


@pytest.mark.parametrize("file", SCHEMAS)
@pytest.mark.slow
def test_files_are_as_their_schemas_want_them(file):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", SCHEMAS[file], str(ROOT / file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_citation_is_of_this_version_and_of_the_readmes_paper():
    citation, readme = yaml.safe_load((ROOT / "CITATION.cff").read_text()), (ROOT / "README.md").read_text()
    assert (citation["title"], citation["version"]) == (PROJECT["name"], PROJECT["version"])
    assert citation["license"] == PROJECT["license"]
    paper = citation["preferred-citation"]
    assert all(f"{{{value}}}" in readme for value in (paper["title"], paper["journal"], str(paper["year"])))


def instructions() -> list[dockerfile.Command]:
    return list(dockerfile.parse_file(str(ROOT / "Dockerfile")))


def test_the_docker_file_builds_from_what_is_there():
    """As far as can be told without Docker: it parses, starts as a user, and installs extras that exist."""
    named = {command.cmd.lower(): command for command in instructions()}
    names = [command.cmd.lower() for command in instructions()]
    assert (
        names[0] == "from" and names.index("user") < names.index("entrypoint") and named["user"].value == ("skipdit",)
    )
    minor = int(re.fullmatch(r"python:3\.(\d+)-slim", named["from"].value[0])[1])
    assert minor >= int(PROJECT["requires-python"].removeprefix(">=3."))
    assert named["entrypoint"].value[0] in PROJECT["scripts"] and named["entrypoint"].json and named["cmd"].json
    runs = " ".join(value for command in instructions() if command.cmd.lower() == "run" for value in command.value)
    (extras,) = re.findall(r"skipdit\[([\w,]+)\]", runs)
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()


def test_nothing_that_the_package_needs_is_kept_from_docker():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"].values()
    for name in [*filter(None, packaged), "pyproject.toml", "README.md", "LICENSE", "src"]:
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in ignored), name


@pytest.mark.slow
def test_the_sdist_has_what_the_wheel_is_built_from(tmp_path):
    """As the release workflow builds it."""
    from test_packaging import copy_of_the_checkout

    source = copy_of_the_checkout(tmp_path / "source")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", str(source)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=300)
    (file,) = (source / "dist").glob("*.tar.gz")
    assert file.name == f"skipdit-{PROJECT['version']}.tar.gz"
    with tarfile.open(file) as archive:
        inside = {str(Path(*Path(name).parts[1:])) for name in archive.getnames()}
    wanted = ["README.md", "LICENSE", "configs/class-to-image/demo.yaml", "class-to-image/weights/vae/config.json"]
    wanted += ["class-to-image/model.py", "src/skipdit/training/new.py", "class-to-video/weights/emoji-deep-skip.pt"]
    assert not set(wanted) - inside


def test_the_release_workflow_runs_what_is_there():
    steps = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]["build"]["steps"]
    told = "\n".join(step.get("run", "") for step in steps)
    assert "python -m build" in told and "twine check --strict" in told
    assert set(re.findall(r"bin/skipdit (\w+)", told)) == {"doctor", "demo"}
