"""Building the kernels: where the library is kept, what makes it be built again, and when it is not used."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lissom.errors import UnsupportedError
from lissom.ops import KERNELS, gated_delta_rule, selective_scan
from lissom.ops.divergence import token_divergence
from lissom.ops.native import build, instruction_sets, load_kernels, self_test
from lissom.ops.native.instruction_sets import INSTRUCTION_SETS, SWITCH, usable_sets
from lissom.ops.quantization import fake_quantize, fake_quantize_backward, fake_quantize_dynamic

MISSING = load_kernels()
GENERIC = INSTRUCTION_SETS[-1]
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the kernels are built on Linux only"),
    pytest.mark.skipif(bool(MISSING), reason=str(MISSING)),
]


def compiler_that_copies(folder: Path, library: str | Path) -> str:
    """A compiler that writes a library that is there already, and counts its calls in `log`."""
    script = folder / "compiler"
    log = f'echo built >> "{folder / "log"}"\nsleep 0.2\n'
    script.write_text(f'#!/bin/sh\ncase "$*" in *" -E "*) exit;; esac\n{log}for path; do :; done\ncp "{library}" "$path"\n')
    script.chmod(0o755)
    return str(script)


def in_process(code: str, **environment: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_second_process_waits_for_build_and_builds_nothing(tmp_path):
    (tmp_path / "library").write_text("library\n")
    compiler, library = compiler_that_copies(tmp_path, tmp_path / "library"), tmp_path / "kernels-0.so"
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(build.build_once, [compiler], library, GENERIC) for _ in range(3)]:
            done.result()
    assert library.read_text() == "library\n"
    assert (tmp_path / "log").read_text() == "built\n"
    # What cannot be loaded fails its self-test, and is not built again at the next start.
    assert "Could not load this library" in str(build.self_test_of(library))


@pytest.mark.parametrize("size", [0, 100, 1000, 100_000, 800_000])
def test_a_library_cut_short_is_found_out(tmp_path, size):
    kept = build.kept_library()
    library = tmp_path / kept.name
    library.write_bytes(kept.read_bytes())
    build._record(library).write_bytes(build._record(kept).read_bytes())
    assert build.self_test_of(library) == ""
    os.truncate(library, size)
    assert build.self_test_of(library) is None


@pytest.mark.parametrize(
    "record", ["", "[]", "{}", "null", '{"sha256": 1}', '{"sha256": "HASH"}', '{"sha256": "HASH", "self_tests": []}']
)
def test_a_damaged_record_is_found_out(tmp_path, record):
    library = tmp_path / "kernels-0.so"
    library.write_text("library")
    build._record(library).write_text(record.replace("HASH", build._hash_of(library)))
    assert build.self_test_of(library) is None


@pytest.mark.slow
def test_a_library_cut_short_is_built_again(tmp_path):
    compiler = compiler_that_copies(tmp_path, build.kept_library())
    code = "from lissom.ops.native import build, load_kernels; print(load_kernels() or build.kept_library())"
    library = Path(in_process(code, XDG_CACHE_HOME=str(tmp_path), CXX=compiler))
    assert library.parent == tmp_path / "lissom"
    assert library.parent.stat().st_mode & 0o777 == 0o700
    os.truncate(library, 1000)
    assert Path(in_process(code, XDG_CACHE_HOME=str(tmp_path), CXX=compiler)) == library
    assert (tmp_path / "log").read_text() == "built\nbuilt\n"


def test_library_that_fails_its_self_test_is_not_used(tmp_path):
    (tmp_path / "library").write_text("no library")
    compiler = compiler_that_copies(tmp_path, tmp_path / "library")
    code = (
        "import torch; from lissom.ops.native import load_kernels\n"
        "for _ in range(2):\n"
        "    print(load_kernels()); load_kernels.cache_clear()\n"
    )
    found, again = in_process(code, XDG_CACHE_HOME=str(tmp_path), CXX=compiler).splitlines()
    assert found.startswith("the C++ kernels failed their self-test: ")
    assert found.endswith(".json to build them again")
    assert again == found
    assert (tmp_path / "log").read_text() == "built\n"


def test_the_self_test_names_the_kernel_that_differs(monkeypatch):
    self_test.main(str(build.kept_library()))
    monkeypatch.setattr(self_test, "ALLOWED", dict.fromkeys(self_test.ALLOWED, -1.0))
    with pytest.raises(SystemExit, match=r"packed_linear of torch.float32 has an error of \d"):
        self_test.main(str(build.kept_library()))


def test_exit_status_of_fault_is_one_that_is_expected():
    assert self_test.FAILED == build.FAILED


def test_the_self_test_calls_every_kernel():
    quantizers = (fake_quantize, fake_quantize_dynamic, fake_quantize_backward)
    kernels = (*KERNELS, gated_delta_rule, selective_scan, token_divergence, *quantizers)
    assert {name for name, *_ in self_test.cases(torch.float32)} == {kernel.name().split("::")[1] for kernel in kernels}


@pytest.mark.parametrize("value", ["", "cache", "./cache", None])
def test_a_cache_that_is_not_absolute_is_ignored(tmp_path, monkeypatch, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert build.cache_folder() == tmp_path / ".cache" / "lissom"


def test_a_cache_others_may_write_to_is_not_used(tmp_path, monkeypatch):
    shared = tmp_path / "lissom"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.warns(UserWarning, match=r"Lissom keeps its C\+\+ kernels in .* can be written to by other users"):
        found = build.cache_folder()
    assert found == tmp_path / f"lissom-{os.getuid()}"
    found.chmod(0o770)
    with pytest.raises(PermissionError, match="can be written to by other users"):
        build.cache_folder()


def test_without_home_folder_cache_is_temporary_one(tmp_path, monkeypatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.warns(UserWarning, match="Could not determine home directory"):
        assert build.cache_folder() == tmp_path / f"lissom-{os.getuid()}"


def test_a_compiler_that_is_not_there_is_named(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/no/interpreter\n")
    broken.chmod(0o755)
    code = (
        "import os; from lissom.ops.native import load_kernels\n"
        "print(load_kernels()); load_kernels.cache_clear()\n"
        f"os.environ['CXX'] = {str(broken)!r}; print(load_kernels())"
    )
    absent, unusable = in_process(code, XDG_CACHE_HOME=str(tmp_path), CXX="no-compiler -O1").splitlines()
    assert absent == "CXX names the compiler 'no-compiler', and there is no such program"
    assert "No such file or directory" in unusable


def test_flags_name_another_library(monkeypatch):
    plain = build._name(GENERIC, "")
    monkeypatch.setenv(build.FLAGS, "-O1")
    assert build._name(GENERIC, "") != plain
    assert build._name(GENERIC, "clang++") != build._name(GENERIC, "")


def test_packaged_library_is_tested_once_without_compiler(tmp_path, monkeypatch):
    kept, isa = build.kept_library(), usable_sets()[0]
    package, cache = tmp_path / "libraries", tmp_path / "cache"
    package.mkdir()
    cache.mkdir(mode=0o700)
    monkeypatch.setattr(build, "_SHIPPED", package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("CXX", "no-compiler")
    library = package / build._name(isa, "")
    library.write_bytes(kept.read_bytes())
    package.chmod(0o555)
    runs: list[Path] = []
    monkeypatch.setattr(build, "run_self_test", lambda tested: runs.append(tested) or "")
    assert build.kept_library() == build.kept_library() == library
    assert runs == [library]
    assert [path.name for path in package.iterdir()] == [library.name]
    monkeypatch.setenv(build.FLAGS, "-O1")
    assert build.shipped_library(isa) is None


def test_a_library_in_the_cache_needs_no_compiler(tmp_path):
    kept = build.kept_library()
    (tmp_path / "lissom").mkdir(mode=0o700)
    for path in (kept, build._record(kept)):
        (tmp_path / "lissom" / path.name).write_bytes(path.read_bytes())
    code = "from lissom.ops.native import load_kernels; print(load_kernels())"
    assert in_process(code, XDG_CACHE_HOME=str(tmp_path), PATH="/nowhere") == "None"


def test_foreign_library_is_tested_here_and_not_built(tmp_path, monkeypatch):
    kept = build.kept_library()
    library = tmp_path / kept.name
    library.write_bytes(kept.read_bytes())
    build._write_record(library, build._record(library), {"another": ""})
    assert build.self_test_of(library) is None
    monkeypatch.setattr(build, "run_self_test", lambda _: "tested")
    build.build_once(["/no/compiler"], library, GENERIC)
    assert build.self_test_of(library) == "tested"
    assert build._self_tests(library) == {"another": "", build.processor_kind(): "tested"}


@pytest.mark.skipif(len(INSTRUCTION_SETS) == 1, reason="x86 only")
def test_the_best_instruction_set_of_a_processor_is_used(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    sets = {item.name: item for item in INSTRUCTION_SETS}
    for name, item in sets.items():
        monkeypatch.setattr(instruction_sets, "processor_features", lambda item=item: frozenset(item.features))
        assert usable_sets()[0].name == name
    monkeypatch.setattr(instruction_sets, "processor_features", lambda: frozenset(sets["avx2"].features))
    assert [item.name for item in usable_sets()] == ["avx2", "generic"]
    monkeypatch.setenv(SWITCH, "generic")
    assert [item.name for item in usable_sets()] == ["generic"]
    monkeypatch.setenv(SWITCH, "avx512")
    with pytest.raises(
        UnsupportedError, match=r"^LISSOM_NATIVE_ISA=avx512 needs avx512f, .*, and this processor has avx2, generic$"
    ):
        usable_sets()
    monkeypatch.setenv(SWITCH, "avx3")
    with pytest.raises(
        UnsupportedError, match=r"^LISSOM_NATIVE_ISA=avx3 names no instruction set; this processor has avx2, gen"
    ):
        usable_sets()


@pytest.mark.skipif(len(INSTRUCTION_SETS) == 1, reason="x86 only")
def test_set_that_compiler_does_not_know_is_passed_over(tmp_path):
    script = tmp_path / "old"
    script.write_text('#!/bin/sh\ncase "$*" in *-mavx2*) echo "error: unrecognized option" >&2; exit 1;; esac\nexec g++ "$@"\n')
    script.chmod(0o755)
    assert build._unsupported([str(script)], INSTRUCTION_SETS[0]) == "error: unrecognized option"
    assert build._unsupported([str(script)], GENERIC) is None


def test_self_test_that_cannot_run_says_nothing_about_library(tmp_path, monkeypatch):
    kept = build.kept_library()
    library = tmp_path / kept.name
    library.write_bytes(kept.read_bytes())
    build._write_record(library, build._record(library), {})
    for code, said in (
        ("raise ImportError('no torch here')", "their self-test could not run: ImportError: no torch here"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "their self-test could not run: it was ended by SIGKILL"),
    ):
        monkeypatch.setattr(build, "python_command", lambda *_, code=code: [sys.executable, "-c", code])
        with pytest.raises(RuntimeError) as caught:
            build.build_once(["/no/compiler"], library, GENERIC)
        assert str(caught.value) == said
        assert build._self_tests(library) == {}
    code = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
    monkeypatch.setattr(build, "python_command", lambda *_: [sys.executable, "-c", code])
    build.build_once(["/no/compiler"], library, GENERIC)
    assert build.self_test_of(library) == "it was ended by SIGILL"


def test_a_self_test_imports_nothing_from_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    assert build.run_self_test(build.kept_library()) == ""


def test_an_environment_variable_with_an_open_quote_is_named(monkeypatch):
    monkeypatch.setenv("CXX", '"g++')
    with pytest.raises(RuntimeError, match=r"^CXX cannot be split into words: No closing quotation$"):
        build.find_compiler()
    monkeypatch.setenv(build.FLAGS, "'-O1")
    with pytest.raises(RuntimeError, match=r"^LISSOM_CXXFLAGS cannot be split into words: No closing quotation$"):
        build._name(GENERIC, "")


def test_a_compiler_may_write_anything(tmp_path):
    script = tmp_path / "compiler"
    script.write_text("#!/bin/sh\nprintf 'error: \\377 bad\\n' >&2\nexit 1\n")
    script.chmod(0o755)
    assert build._unsupported([str(script)], GENERIC) == "error: \ufffd bad"
