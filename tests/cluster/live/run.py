"""`make test-cluster`: runs pytest in a namespace where hosts can be built; says what is missing for that."""

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
NEEDED = {
    "ip": "iproute2",
    "unshare": "util-linux",
    "ssh": "openssh-client",
    "rsync": "rsync",
    "sshd": "openssh-server",
}


def main() -> str:
    """Command line; the arguments go to pytest.  Returns only to say why not."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [package for program, package in NEEDED.items() if shutil.which(program, path=path) is None]
    if missing:
        return f"error: make test-cluster needs: apt-get install {' '.join(missing)}"
    if os.geteuid() != 0:
        return "error: make test-cluster builds network namespaces with SSH servers and must be run by root"
    os.environ["PATH"] = path
    tests = [str(item) for item in sorted(ROOT.glob("tests/cluster/test_*.py"))] + [
        str(ROOT / "tests/cluster/live/proof.py")
    ]
    inside = [sys.executable, "-m", "pytest", "-s", "--timeout=2400", *(sys.argv[1:] or tests)]
    namespaces = ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    os.chdir(ROOT)
    return os.execvp("unshare", ["unshare", *namespaces, "--", *inside])


if __name__ == "__main__":
    sys.exit(main())
