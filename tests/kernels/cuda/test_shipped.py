"""The PTX files: made of the sources as they stand, fit for the GPUs they are for, and whole."""

from __future__ import annotations

import json
import zlib

import pytest

from gpugrad.errors import KernelError
from gpugrad.kernels.cuda import assembly, build, compiler
from gpugrad.kernels.cuda.launch import SHIPPED, Entry
from tests.kernels.cuda import offline

FAMILIES = build.families()

#: Arrays that each kernel reads and writes in accesses of 16 bytes.
WIDE_ACCESSES = {
    "map": None,  # as many as its formula has operands
    "bias_forward": (2, 1),
    "bias_backward": (3, 1),
    "summary_kernel": (1, 0),
}


def entries(family: str) -> dict[str, Entry]:
    return build.entries(family)


def shipped(family: str) -> str:
    return (SHIPPED / f"{family}.ptx").read_text(encoding="utf-8")


def manifest(family: str) -> dict:
    return json.loads((SHIPPED / f"{family}.json").read_text(encoding="utf-8"))


def test_the_families_are_found():
    assert {"bias", "elementwise", "reduce"} <= set(FAMILIES)
    assert "build" not in FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_what_ships_is_made_of_these_sources(family):
    problems = build.stale(family)
    assert not problems, "run python -m gpugrad.kernels.cuda.build: " + "; ".join(problems[:5])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_ships_is_made_again_the_same(family):
    """A few kernels of each family, which their names decide; the build command makes all."""
    try:
        here = compiler.versions()
    except KernelError as error:
        pytest.skip(str(error))
    there = {key: manifest(family)["made by"].get(key) for key in here}
    names = sorted(entries(family), key=lambda name: zlib.crc32(name.encode()))[:6]
    text = shipped(family)
    for name in names:
        again = entries(family)[name].compiled()
        if again != assembly.section(text, name) and here != there:
            pytest.skip(f"shipped by {there}, compiled by {here} to something else")
        if again != assembly.section(text, name) and family == "attention":
            # The same source, compiled twice by one process, may come out in two ways.
            pytest.xfail("the compiler joins neighbouring loads now so, now otherwise")
        assert again == assembly.section(text, name), f"{name} is not what its source compiles to"


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_are_whole(family):
    text = shipped(family)
    for name, entry in entries(family).items():
        section = assembly.section(text, name)
        offline.assert_whole(name, section)
        if entry.storage != "float64":
            offline.assert_single(name, section)


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_accessed_in_16_bytes(family):
    text = shipped(family)
    for name, entry in entries(family).items():
        for prefix, wanted in WIDE_ACCESSES.items():
            if name.startswith(prefix):
                operands = sum(s.endswith("*") for s in entry.kernel.signature(entry.storage)) - 1
                found = offline.accesses(assembly.section(text, name), entry.storage)
                assert found == (wanted or (operands, 1)), name


@pytest.mark.parametrize("architecture", build.ARCHITECTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_assemble_and_are_light(family, architecture):
    found = offline.usage(shipped(family), architecture)
    told = manifest(family)
    assert set(found) == set(entries(family))
    for name, usage in found.items():
        offline.assert_light(name, usage)
        registers = told["kernels"][name]["registers"][architecture]
        if told["made by"]["assembler"] == build.assembler_version():
            assert usage.registers == registers, name
        else:
            assert usage.registers <= registers + 16, name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_for_old_drivers_and_gpus(family):
    lines = shipped(family).splitlines()
    assert ".version 8.0" in lines
    assert ".target sm_80" in lines
    assert sum(line.startswith((".version", ".target")) for line in lines) == 2


def test_a_changed_source_is_noticed(tmp_path, monkeypatch):
    for suffix in ("ptx", "json"):
        (tmp_path / f"reduce.{suffix}").write_bytes((SHIPPED / f"reduce.{suffix}").read_bytes())
    assert build.stale("reduce", tmp_path) == []
    from gpugrad.kernels.cuda import reduce
    from gpugrad.kernels.cuda.language import digest

    before = digest(reduce.summary_kernel, "float32")
    changed = reduce.peak_of.scalar
    monkeypatch.setattr(changed, "text", "def peak(a, x): return a", raising=False)
    assert digest(reduce.summary_kernel, "float32") != before
    for entry in build.entries("reduce").values():
        monkeypatch.delitem(entry.__dict__, "digest", raising=False)
    problems = build.stale("reduce", tmp_path)
    assert len(problems) == 6
    assert "other source" in problems[0]
    assert reduce.summary_kernel["float32"].shipped() is None
    for entry in build.entries("reduce").values():
        monkeypatch.delitem(entry.__dict__, "digest")


def test_missing_and_left_over_kernels_are_noticed(tmp_path):
    text = shipped("reduce")
    kept = text.replace("kernel summary_kernel_float32", "kernel gone").replace(
        "float64", "float128"
    )
    (tmp_path / "reduce.ptx").write_text(kept)
    (tmp_path / "reduce.json").write_text(json.dumps(manifest("reduce")))
    problems = build.stale("reduce", tmp_path)
    assert "summary_kernel_float32 is not in the PTX" in problems
    assert "gone ships, but is no kernel any more" in problems
    assert "summary_kernel_float128 ships, but is no kernel any more" in problems
    (problem,) = build.stale("nothing", tmp_path)
    assert problem.endswith("nothing.ptx or .json is not there")


def test_only_what_changed_is_made(tmp_path, monkeypatch):
    """With the same compilers; the kernels that are kept are those that were there."""
    made = []
    monkeypatch.setattr(compiler, "versions", lambda: {"compiler": "a fake"})
    monkeypatch.setattr(build, "assemble", lambda text, _: {
        name: build.Usage(1, 0, 0, 0) for name in assembly.sections(text)
    })  # fmt: skip

    def compiled(family, names):
        made.append(list(names))
        text = shipped("reduce")
        return {name: assembly.section(text, name) for name in made[-1]}

    monkeypatch.setattr(build, "compiled", compiled)
    assert build.build("reduce", tmp_path) == 6
    assert build.build("reduce", tmp_path) == 0
    assert (tmp_path / "reduce.ptx").read_text() == shipped("reduce")
    entry = build.entries("reduce")["summary_kernel_float32"]
    monkeypatch.setitem(entry.__dict__, "digest", "other")
    assert build.build("reduce", tmp_path) == 1
    assert made[1] == ["summary_kernel_float32"]
    monkeypatch.setattr(build, "recipe", lambda: "other")
    assert build.build("reduce", tmp_path) == 6
    assert build.build("reduce", tmp_path, anew=True) == 6
