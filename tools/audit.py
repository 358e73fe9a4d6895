"""Look up known vulnerabilities of the installed packages that dynamo_redis needs to run.

pip-audit asks the OSV database. Without a network, or while the database does not answer, `make audit` says
so and ends with 0: an audit that could not be made is no finding.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PRODUCT = "dynamo-redis"
_UNREACHABLE = re.compile(r"^(?:requests|urllib3|pip_audit)[\w.]*\.(\w+)|Could not connect", re.MULTILINE)
"""The last line of pip-audit when it could not ask. An error of its own has another module's name."""


def requirements_to_run(name: str = PRODUCT, extras: frozenset[str] = frozenset({"all"})) -> list[str]:
    """Return the installed packages that a package needs, and those that they need, as NAME==VERSION."""
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    open_ones = [(name, extras)]
    while open_ones:
        package, wanted = open_ones.pop()
        if (package, wanted) in seen:
            continue
        seen.add((package, wanted))
        try:
            distribution = metadata.distribution(package)
        except metadata.PackageNotFoundError:  # for another platform
            continue
        if package != name:
            found[package] = distribution.version
        for line in distribution.requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in (wanted or {""})
            ):
                open_ones.append((canonicalize_name(needed.name), frozenset(needed.extras)))
    return [f"{package}=={version}" for package, version in sorted(found.items())]


def audit(requirements: list[str], arguments: list[str]) -> int:
    """Audit packages, print what is found, and return the exit code: 1 if a package is vulnerable."""
    with tempfile.TemporaryDirectory() as directory:
        listed = Path(directory) / "requirements.txt"
        listed.write_text("\n".join(requirements) + "\n")
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(listed)]
        command += ["--no-deps", "--disable-pip", "--vulnerability-service", "osv"]
        command += ["--format", "json", "--progress-spinner", "off", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    try:
        dependencies = json.loads(done.stdout)["dependencies"]
    except ValueError:
        if not _UNREACHABLE.search(done.stderr):
            print(done.stderr, file=sys.stderr)
            return 1
        reason = done.stderr.strip().rpartition("\n")[2]
        print(f"the database of vulnerabilities cannot be reached, nothing was audited: {reason}")
        return 0
    for each in dependencies:
        for found in each["vulns"]:
            fixed = ", ".join(found["fix_versions"]) or "no release"
            print(
                f"{each['name']} {each['version']}: {found['id']}, fixed in {fixed}: {found['description']}"
            )
    vulnerable = sum(bool(each["vulns"]) for each in dependencies)
    print(f"{len(dependencies)} packages, {vulnerable} with known vulnerabilities")
    return 1 if vulnerable else 0


if __name__ == "__main__":
    sys.exit(audit(requirements_to_run(), sys.argv[1:]))
