"""Tests of lissom.artifacts.directory and manifest: whole or not at all when written; only what was written when read."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import lissom
from lissom.artifacts import artifact, directory
from lissom.artifacts.directory import read_directory, write_directory
from lissom.artifacts.manifest import NAME, Content, Manifest, read_manifest, write_manifest
from lissom.errors import ArtifactError
from tests.support.models import feed_forward
from tests.support.neighbours import all_but_slow
from tests.support.saving import compiled

FILES = (NAME, "program.json", "steps.json", "weights.safetensors")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "artifact"
    compiled("bert").save(path)
    return path


@pytest.fixture(scope="module")
def runtimes(tmp_path_factory):
    """An artifact of the backend onnxruntime."""
    case = feed_forward()
    path = tmp_path_factory.mktemp("runtimes") / "artifact"
    lissom.compile(case.model, case.inputs, backend=lissom.OnnxRuntime(threads=1, timing_seconds=0.0)).save(path)
    return path


@pytest.fixture
def saved(original, tmp_path):
    """A copy of an artifact, alone in its directory."""
    return Path(shutil.copytree(original, tmp_path / "here" / "artifact"))


def refusal(path: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        lissom.load(path)
    return str(caught.value).replace(str(path), "DIR")


def rewrite(path: Path, **changes: object) -> None:
    """The manifest with other fields, and sealed as if Lissom had written it."""
    found = read_manifest(path / NAME)
    write_manifest(Manifest(**(vars(found) | changes)), path / NAME)


def contents(path: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in path.iterdir()}


def test_the_files_are_these(saved):
    assert sorted(path.name for path in saved.iterdir()) == sorted(FILES)
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir()} == {0o666 & ~_umask()}
    assert saved.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_manifest_says_what_is_there(saved):
    manifest = json.loads((saved / NAME).read_text())
    assert (manifest["kind"], manifest["version"], manifest["name"]) == ("lissom artifact", 2, "BertModel")
    assert (manifest["backend"], manifest["device"]) == ("eager", "cpu")
    assert manifest["signature"].startswith("(*, input_ids: i64[batch, sequence]")
    assert set(manifest["environment"]) == {"python", "torch", "lissom", "cpu", "kernels"}
    assert sorted(manifest["files"]) == sorted(FILES[1:])
    for name, content in manifest["files"].items():
        assert Content(**content) == Content.of(saved / name)


def check_every_file(folder: Path, damage: Callable[[Path], None]) -> None:
    """Each file of an artifact that is damaged is refused, and the artifact is whole again after it is put back."""
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        damage(path)
        with pytest.raises(ArtifactError):
            lissom.load(folder)
        path.write_bytes(whole)
    assert lissom.load(folder).backend == "onnxruntime"


@pytest.mark.parametrize(
    "damage",
    [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1]), lambda path: path.write_bytes(b"")],
    ids=["missing", "truncated", "empty"],
)
def test_every_file_of_an_onnx_artifact_is_needed(runtimes, damage):
    assert {"model.onnx", "batches.json"} < {path.name for path in runtimes.iterdir()}
    check_every_file(runtimes, damage)


@pytest.mark.parametrize("place", [0, 1, 8, 0.2, 0.5, 0.8, -1])
def test_changed_byte_in_any_onnx_artifact_file_is_noticed(runtimes, place):
    def damage(path: Path) -> None:
        whole = bytearray(path.read_bytes())
        whole[int(place * len(whole)) if isinstance(place, float) else place] ^= 1
        path.write_bytes(whole)

    check_every_file(runtimes, damage)


@pytest.mark.parametrize("name", all_but_slow(FILES, NAME, "program.json", "weights.safetensors"))
def test_a_changed_byte_is_noticed_wherever_it_is(saved, name):
    path = saved / name
    whole = path.read_bytes()
    places = {0, 1, 2, 7, 8, 9, len(whole) - 2, len(whole) - 1, *range(0, len(whole), max(1, len(whole) // 60))}
    for place in sorted(places):
        for flipped in (1, 0x80):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ flipped]) + whole[place + 1 :])
            with pytest.raises(ArtifactError):
                lissom.load(saved)
    path.write_bytes(whole)
    assert lissom.load(saved).program.name == "BertModel"


def test_a_changed_byte_is_told(saved):
    path = saved / "weights.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    assert refusal(saved) == (
        "'DIR/weights.safetensors' was changed after it was written: its SHA-256 is another; copy it again, or save again"
    )


def test_a_changed_manifest_is_told(saved):
    text = (saved / NAME).read_text()
    (saved / NAME).write_text(text.replace('"name": "BertModel"', '"name": "BertOther"'))
    assert refusal(saved) == f"'DIR/{NAME}' was changed after it was written: its SHA-256 is another; save the model again"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_refused(saved, name, kept):
    size = (saved / name).stat().st_size
    os.truncate(saved / name, int(size * kept))
    said = refusal(saved)
    assert f"DIR/{name}' " in said
    assert "bytes, and had" in said or name == NAME


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_file_is_refused(saved, name):
    (saved / name).unlink()
    assert refusal(saved) == f"there is no file 'DIR/{name}'; copy the artifact whole, or save again"


def test_a_file_too_many_is_refused(saved):
    (saved / "more.bin").write_bytes(b"")
    assert refusal(saved) == "'DIR' holds 'more.bin', which its manifest does not name; take it out, or save again"


def test_a_directory_that_is_no_artifact_is_refused(saved, tmp_path):
    assert refusal(tmp_path / "nothing") == "there is no directory 'DIR'; name one that CompiledModel.save wrote"
    (saved / NAME).unlink()
    assert refusal(saved) == f"'DIR' is not an artifact: it has no {NAME}; name a directory that CompiledModel.save wrote"
    (saved / NAME).write_text('{"manifest_version": 3}')
    assert refusal(saved) == f"'DIR/{NAME}' is not a Lissom manifest; name a directory that CompiledModel.save wrote"
    (saved / NAME).write_text("[" * 100_000)
    assert refusal(saved).startswith(f"'DIR/{NAME}' holds no JSON that can be read (")


def test_a_manifest_from_the_future_is_refused(saved):
    text = (saved / NAME).read_text()
    (saved / NAME).write_text(text.replace('"version": 2', '"version": 1', 1))
    assert refusal(saved) == (
        f"'DIR/{NAME}' is of format version 1, and this Lissom reads version 2; "
        "install the Lissom that wrote it, or save the model again with this one"
    )


@pytest.mark.parametrize("name", FILES)
def test_a_symbolic_link_is_refused(saved, name):
    moved = saved.parent / "elsewhere"
    (saved / name).rename(moved)
    (saved / name).symlink_to(moved)
    assert refusal(saved) == f"'DIR/{name}' is a symbolic link; an artifact holds regular files only: copy the file itself"


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "..", ".", ".hidden", "a/b", "a\\b", "", "a\n", NAME])
def test_a_name_that_leads_out_is_refused(saved, name):
    (saved.parent / "outside").write_bytes(b"x")
    found = read_manifest(saved / NAME)
    rewrite(saved, files={**found.files, name: Content(1, "0" * 64)})
    assert refusal(saved) == (
        f"'DIR/{NAME}' names the file {name!r}, which is not in the artifact's directory itself; do not use this artifact"
    )


def test_folder_in_place_of_file_is_refused(saved):
    (saved / "steps.json").unlink()
    (saved / "steps.json").mkdir()
    expected = "'DIR/steps.json' is not a regular file; an artifact holds regular files only: copy the file itself"
    assert refusal(saved) == expected


def test_artifact_for_cuda_is_refused_where_there_is_none(saved, monkeypatch):
    rewrite(saved, device="cuda:0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert refusal(saved) == (
        "'DIR' was made for cuda:0, and this machine has no such device; "
        "load it with device='cpu', or compile the model again here"
    )


def test_what_this_lissom_does_not_know_is_refused(saved):
    rewrite(saved, backend="eagre")
    assert refusal(saved).startswith("'DIR' was made by a backend 'eagre'; did you mean 'eager'? this Lissom has eager, ")
    rewrite(saved, backend="eager", device="nowhere")
    assert refusal(saved) == "'DIR' was made for 'nowhere', which is not a device of this PyTorch"
    rewrite(saved, device="cpu", history={"version": 2})
    assert refusal(saved).startswith("'DIR' holds no history this Lissom can read: ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("aten.layer_norm.default", "aten.from_file.default"), "there is no operator 'aten.from_file.default'"),
        (("aten.layer_norm.default", "os.system"), "there is no operator 'os.system'"),
        (("aten.layer_norm.default", "aten.__class__.__name__"), "there is no operator"),
        (("aten.layer_norm.default", "aten.add_.Tensor"), "there is no operator 'aten.add_.Tensor'"),
        (('"dtype":"float32"', '"dtype":"load"'), "'load' is not a dtype of PyTorch"),
        (('"module":"transformers.modeling_outputs"', '"module":7'), "the field 'module' is 7, which is not of type str"),
        (('"op":"placeholder"', '"op":"call_module"'), "'call_module' is not a kind of node"),
        (('"hidden_states"', '"a b"'), "is not an output of a model"),
    ],
)
def test_a_program_that_says_something_else_is_refused(saved, change, said):
    path = saved / "program.json"
    text = path.read_text()
    assert change[0] in text or change[0] == '"hidden_states"'
    path.write_text(text.replace(*change))
    if path.read_text() == text:
        pytest.skip("this model's outputs have no such field")
    found = read_manifest(saved / NAME)
    rewrite(saved, files={**found.files, "program.json": Content.of(path)})
    try:
        lissom.load(saved)
    except ArtifactError as error:
        assert "DIR/program.json' is not a program this Lissom can read: " in str(error).replace(str(saved), "DIR")
        assert said in str(error)
    else:
        assert change[0] == '"hidden_states"'


def test_an_artifact_is_replaced(saved):
    compiled("llama").save(saved)
    assert lissom.load(saved).program.name == "LlamaForCausalLM"
    assert [path.name for path in saved.parent.iterdir()] == ["artifact"]


def test_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "artifact").mkdir()
    compiled("tied").save(tmp_path / "artifact")
    assert lissom.load(tmp_path / "artifact").program.name == "Tied"
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_something_else_is_not_replaced(tmp_path):
    model = compiled("tied")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name, said in [
        ("folder", "exists and is not an artifact, so it is not replaced; choose another directory"),
        ("file", "exists and is not an artifact, so it is not replaced; choose another directory"),
        ("link", "is a symbolic link, and would be replaced; name the directory itself"),
        ("no/where", f"cannot be written: there is no directory '{tmp_path / 'no'}'; make it first"),
    ]:
        with pytest.raises(ArtifactError) as caught:
            model.save(tmp_path / name)
        assert str(caught.value) == f"'{tmp_path / name}' {said}"
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("limit", [10, 1000, 5000, 12_000, 40_000])
def test_a_disk_that_is_full_leaves_what_was_there(saved, limit, before):
    if not before:
        shutil.rmtree(saved)
    was = contents(saved) if before else None
    model = compiled("llama")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ArtifactError) as caught:
            model.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value).startswith(f"'{saved}' cannot be written: ")
    assert [path.name for path in saved.parent.iterdir()] == (["artifact"] if before else [])
    assert was is None or contents(saved) == was


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("place", ["save_weights", "encode_program", "_confirm", "write_manifest"])
def test_an_interrupt_leaves_what_was_there(saved, place, before, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    if not before:
        shutil.rmtree(saved)
    was = contents(saved) if before else None
    monkeypatch.setattr(artifact, place, interrupt)
    with pytest.raises(KeyboardInterrupt):
        compiled("llama").save(saved)
    assert [path.name for path in saved.parent.iterdir()] == (["artifact"] if before else [])
    assert was is None or contents(saved) == was


@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupt_between_the_renames_leaves_the_old_one(saved, at, monkeypatch):
    was, rename, calls = contents(saved), Path.rename, []

    def interrupted(self, target):
        calls.append(target)
        if len(calls) == at:
            raise KeyboardInterrupt
        return rename(self, target)

    # As on file systems that cannot exchange two names.
    monkeypatch.setattr(directory, "_exchange_at_once", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_directory(saved, lambda folder: (folder / "file").write_text("new"))
    assert contents(saved) == was
    assert [path.name for path in saved.parent.iterdir()] == ["artifact"]


def test_process_killed_while_it_saves_leaves_artifact_that_loads(saved):
    script = f"""
import lissom
model = lissom.load({str(saved)!r})
print("ready", flush=True)
while True:
    model.save({str(saved)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    beside = [path for path in saved.parent.iterdir() if path.name.endswith(".old")]
    assert lissom.load(saved if saved.exists() else beside[0]).program.name == "BertModel"


def test_what_is_read_has_been_checked(saved, monkeypatch):
    read: list[str] = []
    real = directory.open_verified

    def noted(path, content):
        read.append(path.name)
        return real(path, content)

    monkeypatch.setattr(directory, "open_verified", noted)
    read_directory(saved)
    assert sorted(read) == sorted(FILES[1:])
