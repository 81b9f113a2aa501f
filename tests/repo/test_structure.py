"""Dependencies point one way: see `allowed_in`, the only statement of the rule in code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMITED = ("ray", "deployments", "vllm", "torch", "transformers")


def allowed_in(module: Path) -> set[str]:
    """Which of the limited packages a file of ``jenga/`` may import."""
    part = module.relative_to("jenga").parts[0]
    return {"vllm_plugin": {"vllm", "torch", "transformers"}, "demo": {"torch", "transformers"}}.get(part, set())


def limited_imports(source: str) -> set[str]:
    """The limited packages that a source imports, at any depth, also by ``import_module("...")``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                names |= {alias.name for alias in node.names}
            case ast.ImportFrom(module=str(module), level=0):
                names.add(module)
            case ast.Call(func=ast.Name(id="import_module") | ast.Attribute(attr="import_module")):
                names |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return {name.split(".")[0] for name in names} & set(LIMITED)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import ray.serve as s", {"ray"}),
        ("def f():\n    from vllm.v1 import core", {"vllm"}),
        ("import importlib\nimportlib.import_module('torch.nn')", {"torch"}),
        ("from .torch import x\nimport raylib", set()),
    ],
)
def test_the_scan_sees_imports(source: str, found: set[str]) -> None:
    assert limited_imports(source) == found


def test_dependencies_point_one_way() -> None:
    files = [file.relative_to(ROOT) for file in (ROOT / "jenga").rglob("*.py")]
    assert len(files) > 5
    wrong = {
        str(file): sorted(bad)
        for file in files
        if (bad := limited_imports((ROOT / file).read_text()) - allowed_in(file))
    }
    assert not wrong
