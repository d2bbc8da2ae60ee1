"""Change the numerical core in small ways and count the changes that the fast tests notice (docs/testing.md).

    python -m benchmarks.mutate                                   # every module, 40 mutants each
    python -m benchmarks.mutate cm_core/noise.py --sample 1000    # all of one module

A mutant is one change of an operator, constant, condition, argument, decorator, call or result. It lives in a forked
process, which imports the changed module in place of the file: no file changes.
"""

import argparse
import ast
import gc
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

METHODS = ("methods/test_losses.py", "methods/test_public_losses.py", "methods/test_methods.py")
TESTS = {f"cm_core/methods/{name}.py": METHODS for name in "base cd cm_inf ct ect edm ict pd scm".split()}
TESTS |= {f"cm_core/methods/{m}.py": (*METHODS, f"methods/test_{m}.py") for m in "cmt dmd meanflow tcm".split()} | {
    "cm_core/curricula.py": ("test_curricula.py",),
    "cm_core/distances.py": ("test_distances.py",),
    "cm_core/guidance.py": ("test_sampling.py", "methods/test_guidance_weights.py"),
    "cm_core/metrics/evaluation.py": ("metrics/test_evaluation.py",),
    "cm_core/noise.py": ("test_noise.py",),
    "cm_core/precond.py": ("test_precond.py", "test_noise.py"),
    "cm_core/sampling.py": ("test_sampling.py",),
    "cm_core/training/ema.py": ("training/test_ema.py",),
}
SWAPPED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
SWAPPED |= {ast.FloorDiv: ast.Mult, ast.MatMult: ast.Add, ast.BitAnd: ast.BitOr, ast.And: ast.Or, ast.Or: ast.And}
SWAPPED |= {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
SWAPPED |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
PLAIN = {"torch", "math", "np", "nn", "F", "functools", "self", "models", "super()"}  # PLAIN.f(x) is not without its f
SECONDS = 120  # after which a mutant counts as killed
ASIDE = (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr)  # messages, and hints to the type checker


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield every change of one node: a word for it, and the node in its place."""
    match node:
        case ast.operator() | ast.cmpop() | ast.boolop() if type(node) in SWAPPED:
            yield "operator", SWAPPED[type(node)]()
        case ast.UnaryOp():
            yield "sign", node.operand
        case ast.Constant(value=bool(value)):
            yield "constant", ast.Constant(not value)
        case ast.Constant(value=int() | float() | str() as value):
            other = value + "X" if isinstance(value, str) else value + 1 if isinstance(value, int) else 2 * value or 1.0
            yield "constant", ast.Constant(other)
        case ast.IfExp() | ast.If() | ast.While():
            yield "condition", type(node)(**dict(ast.iter_fields(node)) | {"test": ast.UnaryOp(ast.Not(), node.test)})
        case ast.Return(value=ast.AST() as value) if ast.unparse(value) != "None":
            yield "result", ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call()):
            yield "statement", ast.Pass()
        case ast.With():
            yield "with", ast.If(ast.Constant(True), node.body, [])
        case ast.FunctionDef(decorator_list=[first, *_]) if ast.unparse(first) != "property":
            yield "decorator", ast.FunctionDef(**dict(ast.iter_fields(node)) | {"decorator_list": []})
        case ast.Call(func=called, args=args, keywords=keywords):
            if isinstance(called, ast.Attribute) and ast.unparse(called.value).split(".")[0] not in PLAIN:
                yield "method", called.value
            for i, keyword in enumerate(keywords):
                yield f"argument {keyword.arg}", ast.Call(called, args, keywords[:i] + keywords[i + 1 :])
            if len(args) > 1:
                yield "last argument", ast.Call(called, args[:-1], keywords)


def mutants(tree: ast.AST) -> Iterator[str]:
    """Change the tree in place in one way at a time, and say which; the next one undoes it."""
    for field, value in ast.iter_fields(tree):
        nodes = value if isinstance(value, list) else [value]
        if field in ("annotation", "returns") or ast.unparse(tree).startswith("model_config"):
            continue
        for i, node in enumerate(nodes):
            documents = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if not isinstance(node, ast.AST) or isinstance(node, ASIDE) or documents:
                continue
            shown = tree if isinstance(node, ast.operator | ast.cmpop | ast.boolop) else node
            for word, changed in changes(node):
                told = f"{shown.lineno}: {word} of {ast.unparse(shown).splitlines()[0]}"
                for there in (changed, node):
                    setattr(tree, field, [*nodes[:i], there, *nodes[i + 1 :]] if nodes is value else there)
                    if there is changed:
                        yield told
            yield from mutants(node)


class Changed(importlib.abc.MetaPathFinder, SourceFileLoader):
    """Finds one module, and loads it from a tree in place of its file."""

    tree: ast.AST

    def find_spec(self, fullname, path, target=None):
        return importlib.util.spec_from_loader(fullname, self) if fullname == self.name else None

    def get_code(self, fullname):
        return compile(ast.fix_missing_locations(self.tree), self.path, "exec")


def survives(path: str, number: int | None = None) -> bool:
    """Run the tests against a mutant (None: against the file) in a forked process."""
    if (pid := os.fork()) == 0:
        signal.alarm(SECONDS)
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        finder = Changed(path.removesuffix(".py").replace("/", "."), os.path.abspath(path))
        finder.tree = ast.parse(Path(path).read_text())
        steps = mutants(finder.tree)  # alive, so that the last change stays
        for _ in range(0 if number is None else number + 1):
            next(steps)
        sys.meta_path.insert(0, finder)
        tests = [f"tests/cm_core/{name}" for name in (*TESTS[path], "test_hyperparameters.py")]
        os._exit(pytest.main(["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", *tests]))
    return os.waitpid(pid, 0)[1] == 0


def inherit() -> None:
    """Import, once for all forks, what takes longer than the tests."""
    import scipy.linalg  # noqa: F401
    import torch

    torch.optim.Adam([torch.ones(1, requires_grad=True)])
    torch.func.jvp(torch.sin, (torch.ones(1),), (torch.ones(1),))
    torch.testing.assert_close(torch.ones(1), torch.ones(1))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    gc.freeze()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=list(TESTS), help="files (all)")
    parser.add_argument("--sample", type=int, default=40, help="mutants of each module, drawn at random (40)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    args = parser.parse_args()
    inherit()
    for path in args.modules:
        start, names = time.perf_counter(), list(mutants(ast.parse(Path(path).read_text())))
        if not survives(path):
            sys.exit(f"{path}: the tests fail without a change")
        drawn = sorted(random.Random(args.seed).sample(range(len(names)), min(args.sample, len(names))))
        alive = [f"  {path}:{names[n]}" for n in drawn if survives(path, n)]
        told = f"{path}: {len(drawn) - len(alive)} of {len(drawn)} killed ({len(names)} in all)"
        print("\n".join([f"{told}, {time.perf_counter() - start:.0f} s", *alive]), flush=True)


if __name__ == "__main__":
    main()
